"""The page of a run: sections of HTML put into `page.html`. Everything that a model or a user wrote is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from string import Template
from typing import Any

from nestling import __version__
from nestling.report.checks import Finding, answer_columns
from nestling.report.figures import draw, plots
from nestling.report.grids import moderation_tables, policies_table, text
from nestling.report.records import Row, Run, StageRecord, number
from nestling.report.table import TableRow, short, spoken

SYNTHETIC = (
    "This run learnt from the embedded world, a synthetic test bench whose facts are generated and known. "
    "Its figures show that the road works; they say nothing about real text, which goes through the same commands."
)
MODEL_NAMES = {"base": "base model", "sft": "after SFT", "ppo": "after PPO", "aligned": "after alignment"}
NOTHING = '<i class="soft">nothing</i>'
MOST_SAMPLES = 12


@dataclass(frozen=True)
class Contents:
    """All that the page shows: the run as read, the report as written, and what was derived from them."""

    run: Run
    report: Mapping[str, Any]
    table: list[TableRow]
    findings: list[Finding]
    answers: list[Row]


@dataclass(frozen=True)
class Section:
    """`Section("curves", "Curves", "<div>…</div>")`; one without a body is left out of the page."""

    anchor: str
    title: str
    body: str
    lead: str = ""


def render(contents: Contents) -> str:
    """The whole page as HTML text that loads nothing from anywhere."""
    run = contents.run
    sections = [section for section in _sections(contents) if section.body]
    template = Template(files("nestling.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=text(run.name),
        subtitle=text(_subtitle(run)),
        description=f"<p>{text(run.description)}</p>" if run.description else "",
        notice=f'<p class="notice"><b>Synthetic world.</b> {text(SYNTHETIC)}</p>' if run.synthetic else "",
        tiles="".join(_tiles(contents)),
        nav="".join(f'<a href="#{section.anchor}">{text(section.title)}</a>' for section in sections),
        sections="\n".join(map(_framed, sections)),
        version=text(__version__),
    )


def _framed(section: Section) -> str:
    lead = f'<p class="soft">{section.lead}</p>' if section.lead else ""
    return f'<section id="{section.anchor}"><h2>{text(section.title)}</h2>{lead}{section.body}</section>'


def _sections(contents: Contents) -> Iterator[Section]:
    run = contents.run
    lead = "Share of held-out problems solved; the tick on each bar is the mark that it was held to."
    yield Section("table", "What it can do", _table(contents.table), lead)
    lead = "The same problems for each model; what aligning cost shows where a share falls."
    yield Section("models", "Model by model", _by_model(run), lead)
    lead = "On texts held out, each judged by thresholds that other texts chose."
    yield Section("moderation", "Moderation", "".join(map(moderation_tables, run.of_kind("moderation"))), lead)
    lead = "The same held-out prompts under every way of choosing who answers; cost as a share of the dearest one's."
    yield Section("routing", "Accuracy against cost", "".join(map(policies_table, run.of_kind("router"))), lead)
    yield Section("wrong", "What looks wrong", _findings(contents.findings))
    lead = "The same prompts, answered by the models of this run one after the other."
    yield Section("answers", "Before and after", "".join(_talks(contents.answers)), lead)
    lead = "Faint lines are single steps, full lines their moving average."
    yield Section("curves", "Curves", _figures(run), lead)
    yield Section("stages", "Stages", _stages(run))
    yield Section("missed", "Problems missed", "".join(_failures(run)), "Some of the answers that cost points.")
    yield Section("samples", "Samples on the way", "".join(_samples(run)), "What the model wrote while learning.")
    yield Section("settings", "Settings", "".join(map(_settings, run.stages)))


def _subtitle(run: Run) -> str:
    parts = []
    if run.finished:
        parts.append(_spoken_time(run.finished))
    parts += [f"{len(run.stages)} stages", f"{duration(run.seconds)} of work"]
    if run.seed is not None:
        parts.append(f"seed {run.seed}")
    return " · ".join(parts)


def _spoken_time(stamp: str) -> str:
    """An ISO 8601 time as "23 November 2026, 14:05 UTC"."""
    time = datetime.fromisoformat(stamp)
    return f"{time.day} {time:%B %Y, %H:%M} {time.tzname() or ''}".strip()


def duration(seconds: float) -> str:
    """Such as "12 min 5 s", "3 h 20 min", "8.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _tiles(contents: Contents) -> Iterator[str]:
    """The few figures to remember, of those that the run has."""
    held = [row for row in contents.table if row.met is not None]
    if held:
        yield _tile(f"{sum(bool(row.met) for row in held)} of {len(held)}", "bars met")
    for stage in contents.run.stages:
        model, ngram = stage.figure("val_bpb"), stage.figure("ngram_bpb")
        if model is not None and stage.kind == "pretrain":
            beside = f"; n-gram model {ngram:.3f}" if ngram is not None else ""
            yield _tile(f"{model:.3f}", f"bits per byte, {stage.name}{beside}")
        if (accuracy := stage.figure("pairwise_accuracy")) is not None:
            yield _tile(f"{accuracy:.1%}", f"of held-out pairs ordered rightly, {stage.name}")
        if (wins := stage.figure("win_rate_vs_sft")) is not None:
            kl = stage.figure("kl")
            spent = f", at KL {kl:.2g}" if kl is not None else ""
            yield _tile(f"{wins:.1%}", f"wins of {stage.name} against SFT{spent}")


def _tile(figure: str, caption: str) -> str:
    return f'<div class="tile"><b>{text(figure)}</b><span>{text(caption)}</span></div>'


def _table(rows: list[TableRow]) -> str:
    if not rows:
        return ""
    head = '<th>what</th><th class="wide"></th><th class="right">reached</th><th class="right">bar</th><th></th>'
    head += '<th class="right wide">95 % interval</th><th class="right wide">problems</th>'
    return f'<div class="card scroll"><table><tr>{head}</tr>{"".join(map(_table_line, rows))}</table></div>'


def _table_line(row: TableRow) -> str:
    mark = {True: '<span class="mark met">✓ met</span>', False: '<span class="mark missed">✗ missed</span>', None: ""}
    cells = [
        f"<td>{text(row.title)}</td>",
        f'<td class="wide">{_meter(row)}</td>',
        f'<td class="right"><b>{text(row.value_text)}</b></td>',
        f'<td class="right soft">{text(row.bar_text)}</td>',
        f'<td class="right">{mark[row.met]}</td>',
        f'<td class="right soft wide">{text(row.interval_text)}</td>',
        f'<td class="right soft wide">{"" if row.n is None else row.n}</td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _meter(row: TableRow) -> str:
    """A bar from 0 to 1 with a tick at the mark; only for shares."""
    if not row.is_share or row.value is None:
        return ""
    width = 100 * min(1.0, max(0.0, row.value))
    tick = "" if row.bar is None else f'<u style="left: {100 * min(1.0, max(0.0, row.bar)):.1f}%"></u>'
    kind = {True: "good", False: "bad", None: ""}[row.met]
    return f'<div class="meter" aria-hidden="true"><i class="{kind}" style="width: {width:.1f}%"></i>{tick}</div>'


def _by_model(run: Run) -> str:
    """Every task for every model that was measured, so that what a step gained or cost is seen."""
    measured: dict[str, Mapping[str, Any]] = {}
    for stage in run.of_kind("evaluate"):
        measured |= stage.report.get("by_model") or {}
    if len(measured) < 2:
        return ""
    head = "".join(f'<th class="right">{text(MODEL_NAMES.get(model, model))}</th>' for model in measured)
    lines = []
    for task in dict.fromkeys(task for values in measured.values() for task in values):
        shares = (number(values.get(task)) for values in measured.values())
        cells = "".join(f'<td class="right">{"–" if share is None else f"{share:.1%}"}</td>' for share in shares)
        lines.append(f"<tr><td>{text(spoken(task))}</td>{cells}</tr>")
    return f'<div class="card scroll"><table><tr><th>what</th>{head}</tr>{"".join(lines)}</table></div>'


def _findings(findings: list[Finding]) -> str:
    if not findings:
        return "<p>Nothing stands out: no curve came apart, no bar was missed.</p>"
    mark = {"wrong": '<span class="mark missed">look</span>', "note": '<span class="mark note">note</span>'}
    lines = (f"<li>{mark[f.weight]}<span><b>{text(f.where)}.</b> {text(f.text)}</span></li>" for f in findings)
    return f'<div class="card"><ul class="found">{"".join(lines)}</ul></div>'


def _talks(answers: list[Row]) -> Iterator[str]:
    models = answer_columns(answers)
    for row in answers:
        said = (
            f'<div><div class="label">{text(MODEL_NAMES.get(model, model))}</div>'
            f'<div class="said">{text(row[model]) or NOTHING}</div></div>'
            for model in models
            if row.get(model) is not None
        )
        kind = f'<div class="label">{text(spoken(str(row["kind"])))}</div>' if row.get("kind") else ""
        asked = f'<div class="asked">{text(as_prompt(row.get("prompt", "")))}</div>'
        yield f'<div class="talk">{kind}{asked}<div class="answers">{"".join(said)}</div></div>'


def as_prompt(prompt: object) -> str:
    """A prompt as the page shows it: plain text as it is, messages one below the other with their roles."""
    if not isinstance(prompt, (list, tuple)):
        return str(prompt)
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in prompt)


def _figures(run: Run) -> str:
    drawn = []
    for count, plot in enumerate(plots(run)):
        caption = f'{text(plot.title)} <span class="soft small">· {text(plot.stage)}</span>'
        drawn.append(f"<figure><figcaption>{caption}</figcaption>{draw(plot, count)}</figure>")
    return f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""


def _stages(run: Run) -> str:
    head = '<th>stage</th><th class="right">time</th><th class="right">tokens</th><th class="right">tokens/s</th>'
    head += '<th class="wide">came to</th><th class="wide">key</th>'
    return f'<div class="card scroll"><table><tr>{head}</tr>{"".join(map(_stage_line, run.stages))}</table></div>'


def _stage_line(stage: StageRecord) -> str:
    tokens, speed = stage.figure("tokens"), stage.figure("tokens_per_second")
    kind = f' <span class="soft small">({text(stage.kind)})</span>' if stage.kind != stage.name else ""
    state = duration(stage.seconds) if stage.finished is not None else "not finished"
    cells = [
        f"<td><b>{text(stage.name)}</b>{kind}</td>",
        f'<td class="right">{text(state)}</td>',
        f'<td class="right">{"" if tokens is None else f"{tokens:,.0f}"}</td>',
        f'<td class="right">{"" if speed is None else f"{speed:,.0f}"}</td>',
        f'<td class="wide small soft">{text(_came_to(stage))}</td>',
        f'<td class="wide"><code>{text(stage.key[:8])}</code></td>',
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _came_to(stage: StageRecord) -> str:
    """The plain numbers of a stage's report in one line."""
    hidden = {"tokens", "tokens_per_second", "seconds"}
    shown = ((key, number(value)) for key, value in stage.report.items() if key not in hidden)
    return ", ".join(f"{spoken(key)} {short(value)}" for key, value in shown if value is not None)


def _failures(run: Run) -> Iterator[str]:
    """The answers that cost points, by model and task, folded away."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in (row for stage in run.of_kind("evaluate") for row in stage.failures):
        groups.setdefault((str(row.get("model", "")), str(row.get("task", ""))), []).append(row)
    for (model, task), rows in groups.items():
        lines = [
            f'<div class="asked">{text(as_prompt(row.get("prompt", "")))}</div>'
            f"<pre>{text(chr(10).join(map(str, row.get('replies', []))))}</pre>"
            for row in rows
        ]
        title = f"{text(MODEL_NAMES.get(model, model))}: {text(spoken(task))} ({len(lines)})"
        yield f'<details class="card"><summary>{title}</summary>{"".join(lines)}</details>'


def _samples(run: Run) -> Iterator[str]:
    for stage in run.stages:
        every = max(1, -(-len(stage.samples) // MOST_SAMPLES))
        lines = []
        for row in stage.samples[::-1][::every][::-1]:  # thinned from the end, so that the last one is shown
            prompt = text(as_prompt(row.get("prompt", "")))
            label = f'<div class="label">step {text(row.get("step", "?"))}</div>'
            lines.append(f"{label}<pre><b>{prompt}</b>{text(row.get('text', row.get('completion', '')))}</pre>")
        if lines:
            yield f'<details class="card"><summary>{text(stage.name)}</summary>{"".join(lines)}</details>'


def _settings(stage: StageRecord) -> str:
    lines = "".join(
        f"<tr><td><code>{text(key)}</code></td><td><code>{text(value)}</code></td></tr>"
        for key, value in [*_flat(stage.settings), *((f"reads.{role}", path) for role, path in stage.reads.items())]
    )
    if not lines:
        return ""
    table = f'<div class="scroll"><table class="settings">{lines}</table></div>'
    return f'<details class="card"><summary>{text(stage.name)}</summary>{table}</details>'


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested settings as dotted keys, in the form that --set takes."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
