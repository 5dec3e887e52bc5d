"""The boxes and buttons of the dashboard. They hold what the person typed; nothing here reacts to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ipywidgets as widgets


def text_box(label: str, value: str, placeholder: str, rows: int, name: str) -> widgets.Textarea:
    """A labelled text box that reports every key."""
    box = widgets.Textarea(value=value, description=label, placeholder=placeholder, rows=rows,
                           continuous_update=True, layout=widgets.Layout(width="100%", height="auto"))
    box.add_class("gptoss-field")
    box.add_class(f"gptoss-{name}-box")
    return box


def line_box(label: str, value: str, name: str) -> widgets.Text:
    """A labelled one-line box."""
    box = widgets.Text(value=value, description=label, continuous_update=True, layout=widgets.Layout(width="100%"))
    box.add_class("gptoss-field")
    box.add_class(f"gptoss-{name}-box")
    return box


def menu(label: str, options: Iterable[tuple[str, str]], value: str, name: str) -> widgets.Dropdown:
    """A labelled drop-down of (shown, value) pairs."""
    made = widgets.Dropdown(options=list(options), value=value, description=label,
                            style={"description_width": "initial"}, layout=widgets.Layout(width="auto"))
    made.add_class("gptoss-menu")
    made.add_class(f"gptoss-{name}-menu")
    return made


def choice(label: str, options: Iterable[Any], value: str, name: str) -> widgets.ToggleButtons:
    """A labelled row of buttons of which one is down."""
    made = widgets.ToggleButtons(options=list(options), value=value, description=label,
                                 style={"button_width": "auto", "description_width": "initial"})
    made.add_class("gptoss-choice")
    made.add_class(f"gptoss-{name}-choice")
    return made


def button(label: str, name: str, tooltip: str, primary: bool = False, disabled: bool = False) -> widgets.Button:
    """A button; what a click does is said by whoever owns it."""
    made = widgets.Button(description=label, tooltip=tooltip, button_style="primary" if primary else "",
                          disabled=disabled, layout=widgets.Layout(width="auto"))
    made.add_class(f"gptoss-{name}")
    return made


def box(children: Iterable[widgets.Widget], *names: str) -> widgets.Box:
    """A box that the style sheet lays out by class name."""
    made = widgets.Box(list(children))
    for name in names:
        made.add_class(name)
    return made


def close_all(widget: widgets.Widget) -> None:
    """Close a widget, everything in it, and the layout and style objects that came with it."""
    for child in getattr(widget, "children", ()):
        close_all(child)
    for part in ("layout", "style"):
        attached = getattr(widget, part, None)
        if isinstance(attached, widgets.Widget):
            attached.close()
    widget.close()
