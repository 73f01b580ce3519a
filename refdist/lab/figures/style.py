"""The common style of all figures.

The colours are from Okabe and Ito's palette, which colour-blind readers can tell apart.
"""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
GREY = "#EEEEEE"
DPI = 110
LABEL = {"boxstyle": "square,pad=0.12", "facecolor": "white", "edgecolor": "none"}


def finished(figure: Figure) -> Figure:
    """Keep pyplot from showing the figure a second time."""
    plt.close(figure)
    return figure
