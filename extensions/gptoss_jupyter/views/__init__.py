"""The browser views. Each is an anywidget that can be used on its own."""

from __future__ import annotations

from gptoss_jupyter.views.base import View
from gptoss_jupyter.views.experts import GridView, RoutesView
from gptoss_jupyter.views.frame import EditsView, StatusView
from gptoss_jupyter.views.heat import HeatView
from gptoss_jupyter.views.predictions import LensView, NextView
from gptoss_jupyter.views.tokens import AnswerView, StripView

__all__ = [
    "AnswerView", "EditsView", "GridView", "HeatView", "LensView", "NextView", "RoutesView", "StatusView", "StripView",
    "View",
]
