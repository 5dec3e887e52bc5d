"""A plotly figure as a live widget that is never empty."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go


def figure_widget(picture: go.Figure) -> go.FigureWidget:
    """The figure as a ``FigureWidget`` whose first message to the page already holds its data.

    plotly (6 and 7) opens the widget first and sends data and layout after; anywidget (0.11) puts such updates off
    until the widget's code has loaded, which for plotly's 5 MB takes a moment. A view made meanwhile draws the empty
    start and is never told of the rest. With the data among the defaults there is no empty start.
    """
    import plotly.graph_objects as go
    from traitlets import default

    class Started(go.FigureWidget):
        @default("_widget_data")
        def _data_from_the_start(self) -> list[Any]:
            return deepcopy(list(picture.to_dict()["data"]))

        @default("_widget_layout")
        def _layout_from_the_start(self) -> dict[str, Any]:
            return deepcopy(dict(picture.to_dict()["layout"]))

    Started.__name__ = "FigureWidget"  # its repr is that of the class it is
    return Started(picture)


def redraw(widget: go.FigureWidget, picture: go.Figure) -> None:
    """Show another picture of one trace in the same widget: making a second one would cost another 5 MB."""
    with widget.batch_update():
        widget.data[0].update(picture.data[0].to_plotly_json(), overwrite=True)
        widget.layout.update(picture.layout.to_plotly_json(), overwrite=True)
