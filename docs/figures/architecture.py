"""Draw `architecture.svg`: one gate per task weights shared experts.

    python docs/figures/architecture.py

All text is in filled boxes, and lines are of a middle grey or a task's colour: the
picture is legible on light and dark backgrounds. The gate weights in it are made up.
"""

from pathlib import Path

WIDTH, HEIGHT = 800, 330
GREY, EXPERTS = "#68727f", "#3d6db3"
TASKS = {"click": ("#00867a", 75), "stars": ("#b85c0a", 255)}
EXPERT_Y = (75, 135, 195, 255)
WEIGHTS = {"click": (0.55, 0.25, 0.15, 0.05), "stars": (0.05, 0.1, 0.35, 0.5)}
INPUT_X, EXPERT_X, SUM_X, TOWER_X, OUTPUT_X = 70, 290, 475, 605, 735


def box(x: float, y: float, width: float, text: str, colour: str) -> str:
    """Return a filled box with text in it, around (x, y)."""
    return (
        f'<rect x="{x - width / 2}" y="{y - 18}" width="{width}" height="36" rx="7" '
        f'fill="{colour}"/>'
        f'<text x="{x}" y="{y + 5}">{text}</text>'
    )


def line(
    x1: float, y1: float, x2: float, y2: float, colour: str, more: str = ""
) -> str:
    """Return a curve from the right of a box to the left of another."""
    bend = (x1 + x2) / 2
    return (
        f'<path d="M{x1} {y1}C{bend} {y1} {bend} {y2} {x2} {y2}" fill="none" '
        f'stroke="{colour}" {more}/>'
    )


def parts() -> list[str]:
    """Return the elements of the picture, lines first."""
    middle = HEIGHT / 2
    lines, boxes = [], [box(INPUT_X, middle, 100, "features", GREY)]
    for i, y in enumerate(EXPERT_Y):
        lines.append(line(INPUT_X + 50, middle, EXPERT_X - 55, y, "#8a94a2"))
        boxes.append(box(EXPERT_X, y, 110, f"expert {i + 1}", EXPERTS))
    for task, (colour, y) in TASKS.items():
        gate_y = 22 if y < middle else HEIGHT - 22
        lines.append(line(INPUT_X + 50, middle, EXPERT_X - 55, gate_y, colour))
        dashes = 'stroke-dasharray="5 4"'
        lines.append(line(EXPERT_X + 55, gate_y, SUM_X, y, colour, dashes))
        boxes.append(box(EXPERT_X, gate_y, 110, f"gate: {task}", colour))
        for expert_y, weight in zip(EXPERT_Y, WEIGHTS[task], strict=True):
            width = f'stroke-width="{1 + 10 * weight:.1f}"'
            lines.append(line(EXPERT_X + 55, expert_y, SUM_X - 18, y, colour, width))
        lines.append(line(SUM_X + 18, y, TOWER_X - 45, y, colour))
        lines.append(line(TOWER_X + 45, y, OUTPUT_X - 35, y, colour))
        boxes.append(
            f'<circle cx="{SUM_X}" cy="{y}" r="18" fill="{colour}"/>'
            f'<text x="{SUM_X}" y="{y + 6}" font-size="18">Σ</text>'
        )
        boxes.append(box(TOWER_X, y, 90, "tower", colour))
        boxes.append(box(OUTPUT_X, y, 70, task, colour))
    return lines + boxes


def picture() -> str:
    """Return the picture as SVG."""
    title = "A gate for each task weighs the outputs of shared experts for its tower"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{title}">',
        '<g stroke-width="2" font-family="Helvetica, Arial, sans-serif" font-size="15" '
        'fill="white" text-anchor="middle">',
        *parts(),
        "</g>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture())
