"""Sections of a run's report about its evaluations on held-out rows: curves, and the blocks before and after."""

from collections.abc import Mapping, Sequence

import numpy as np

from distillcache.tools.pages.figures import Figure, Line, draw_lines
from distillcache.tools.pages.html import Numeric, figures, folded, number, paragraph, table
from distillcache.trainer.run.evaluate import Evaluation
from distillcache.trainer.run.folder import best_of

PERPLEXITY = "perplexity"
GAP_CLOSED = "share of the gap closed"
COSINE = "mean cosine distance"
KL = "KL from the teacher"
AGREEMENT = "same first choice as the teacher"
VIOLATION = "max violation"
WITHOUT_BIASES = "perplexity without biases"
SHARES = (GAP_CLOSED, AGREEMENT)  # in percent, and the higher the better
# Of each curve its title. The violation of held-out rows has none, since steps have one; a perplexity without biases is
# a line beside the other perplexity.
TITLES = {
    PERPLEXITY: "Held-out perplexity by step",
    GAP_CLOSED: "Share of the gap to the teacher that is closed, by step",
    COSINE: "Mean cosine distance to the teacher's blocks by step",
    KL: "KL divergence from the teacher by step",
    AGREEMENT: "Same first choice as the teacher by step",
}
LOWEST_SHARE = -1.0  # of a chart: where the gap grew far, the line leaves it; caption and table have the rest
EVALUATIONS_SHOWN = 12
ROWS_OPEN = 16  # of a table about blocks; a longer one is folded


def evaluation_fragments(evaluations: Sequence[Evaluation]) -> list[str]:
    """Evaluations on held-out rows, or that there are none."""
    if not evaluations:
        return [paragraph("None yet: there were no held-out rows, or no evaluation was due.")]
    columns = _columns(evaluations)
    found = best_of(evaluations)
    best = None if found is None else evaluations.index(found)
    even = np.linspace(0, len(evaluations) - 1, min(len(evaluations), EVALUATIONS_SHOWN)).round().astype(int).tolist()
    shown = sorted({*even} if best is None else {*even, best})
    rows = [
        (
            f"{evaluations[at].step:,}{' (best)' if at == best else ''}",
            *(_cell(name, values[at]) for name, values in columns.items()),
        )
        for at in shown
    ]
    words = (
        f"{len(shown)} of {len(evaluations)} are listed; eval.json has all." if len(shown) < len(evaluations) else ""
    )
    drawn = [evaluation_figure(evaluations, name) for name in TITLES]
    listed = table("Evaluations on held-out rows", ("step", *columns), rows)
    return [figures(drawn), listed, paragraph(words) if words else ""]


def _columns(evaluations: Sequence[Evaluation]) -> Mapping[str, Sequence[float | None]]:
    """Columns of figures by name, without those that are known of no evaluation."""
    columns = {
        PERPLEXITY: [entry.perplexity for entry in evaluations],
        GAP_CLOSED: _gaps(evaluations),
        COSINE: [entry.mean_cosine for entry in evaluations],
        KL: [entry.kl for entry in evaluations],
        AGREEMENT: [entry.agreement for entry in evaluations],
        VIOLATION: [entry.max_violation for entry in evaluations],
        WITHOUT_BIASES: [entry.perplexity_without_bias for entry in evaluations],
    }
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}


def _gaps(evaluations: Sequence[Evaluation]) -> Sequence[float | None]:
    """Shares of the gap that are closed: at the start none, where there is a gap."""
    found = [entry.gap_closed for entry in evaluations]
    known = any(share is not None for share in found)
    starts_open = known and evaluations[0].step == 0 and found[0] is None
    return [0.0, *found[1:]] if starts_open else found


def _cell(name: str, value: float | None) -> Numeric:
    return Numeric(f"{value:,.1%}") if name in SHARES and value is not None else number(value)


def evaluation_figure(evaluations: Sequence[Evaluation], name: str) -> Figure | None:
    """Draw a curve of the evaluations by step, one of `TITLES`; none of a single value, which the table has."""
    line = _line(evaluations, name, "student")
    if line is None or len(line.x) < 2:
        return None
    words = _change(name, line)
    lines = [line, *(_perplexities(evaluations, line) if name == PERPLEXITY else [])]
    told = "".join(f"; {each.name}" for each in lines[1:] if each.name.startswith("teacher"))
    is_share = name in SHARES
    return Figure(
        title=TITLES[name],
        caption=f"{words[:1].upper()}{words[1:]}{told}.",
        alt=f"Line chart of the {name} on held-out rows by step: {words}{told}.",
        svg=draw_lines(
            lines,
            "step",
            name,
            points=len(line.x) <= 2 * EVALUATIONS_SHOWN,
            whole=True,
            percent=is_share,
            covers=[0, 1] if is_share else [],
            lowest=LOWEST_SHARE if is_share else None,
        ),
    )


def _line(evaluations: Sequence[Evaluation], name: str, words: str) -> Line | None:
    values = _columns(evaluations).get(name, ())
    pairs = [(entry.step, value) for entry, value in zip(evaluations, values, strict=False) if value is not None]
    if not pairs:
        return None
    return Line(words, np.asarray([step for step, _ in pairs], float), np.asarray([value for _, value in pairs], float))


def _perplexities(evaluations: Sequence[Evaluation], student: Line) -> list[Line]:
    """Lines to compare the student's perplexity with: the teacher's, its own before training and without biases."""
    bare, ends, found = _line(evaluations, WITHOUT_BIASES, "student without biases"), student.x[[0, -1]], []
    if bare is not None and len(bare.x) > 1:
        found.append(bare)
    start = evaluations[0].perplexity if evaluations[0].step == 0 else None
    if start is not None:
        found.append(Line(f"before training: {start:.4g}", ends, np.full(2, start), level=True))
    teacher = next((each.teacher_perplexity for each in reversed(evaluations) if each.teacher_perplexity), None)
    if teacher is not None:
        found.append(Line(f"teacher: {teacher:.4g}", ends, np.full(2, teacher), level=True))
    return found


def _change(name: str, line: Line) -> str:
    """`236.8 before training, 40.75 at step 60`, and the best value between them where the last one is not it."""
    steps, numbers, higher = line.x, line.y, name in SHARES

    def said(at: int) -> str:
        where = f"at step {int(steps[at]):,}" if steps[at] else "before training"
        return f"{numbers[at]:,.1%} {where}" if higher else f"{numbers[at]:.4g} {where}"

    best, last = int(numbers.argmax() if higher else numbers.argmin()), len(numbers) - 1
    between = f"; {'highest' if higher else 'lowest'} {said(best)}" if 0 < best < last else ""
    return f"{said(0)}, {said(last)}{between}"


def block_fragments(evaluations: Sequence[Evaluation]) -> list[str]:
    """Cosine distance of every block, at the first and at the last evaluation."""
    if not evaluations or not evaluations[-1].blocks:
        return []
    shown = evaluations[:1] if len(evaluations) == 1 else [evaluations[0], evaluations[-1]]
    names = [f"step {entry.step:,}" if entry.step else "before training" for entry in shown]
    listed = table("Cosine distance in numbers", *_distances(shown, names))
    few = len(shown[-1].blocks) <= ROWS_OPEN
    return [figures([_block_figure(shown, names)]), listed if few else folded("Every block in numbers", listed)]


def _block_figure(shown: Sequence[Evaluation], names: Sequence[str]) -> Figure | None:
    """Draw the distance by block; none of a single block, which the table has."""
    if len(shown[-1].blocks) < 2:
        return None
    lines = [
        Line(name, np.asarray(entry.blocks, float), np.asarray(entry.cosine, float))
        for name, entry in zip(names, shown, strict=True)
    ]
    means = [
        f"{entry.mean_cosine:.4g} {name if name == 'before training' else f'at {name}'}"
        for name, entry in zip(names, shown, strict=True)
        if entry.mean_cosine is not None
    ]
    mean = f"mean over the blocks: {', '.join(means) or 'none'}"
    return Figure(
        title="Cosine distance to the teacher's attention outputs by block",
        caption=f"On held-out rows; {mean}.",
        alt=f"Line chart of the cosine distance of attention outputs by block; {mean}.",
        svg=draw_lines(lines, "block", "cosine distance", points=True, whole=True),
    )


def _distances(shown: Sequence[Evaluation], names: Sequence[str]) -> tuple[Sequence[str], list[tuple[object, ...]]]:
    """The header and rows of a table: the distance of each block, and how it changed."""
    before, after = (dict(zip(entry.blocks, entry.cosine, strict=True)) for entry in (shown[0], shown[-1]))
    if len(shown) == 1:
        return ("block", *names), [(str(block), number(value)) for block, value in after.items()]
    rows: list[tuple[object, ...]] = [
        (str(block), number(before.get(block)), number(value), _changed(before.get(block), value))
        for block, value in after.items()
    ]
    return ("block", *names, "change"), rows


def _changed(before: float | None, after: float) -> Numeric:
    return Numeric(f"{after / before - 1:+.1%}") if before else number(None)
