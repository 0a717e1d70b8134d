// Curves of numbers that are logged step by step, drawn as SVG. A figure is made once and given its lines again and again.

import { h, svg } from "./dom.js";
import { language, t } from "./i18n.js";

const HEIGHT = 210;
const MARGIN = { top: 12, right: 12, bottom: 24, left: 52 };
const EDGE = 4; // room for dots on the edge
const MOST_POINTS = 400; // of a line: more than a figure of this width can show
const WINDOW = 25; // a noisy line is averaged over this part of its points
const UNSETTLED = 25; // this part of them, at the start, may leave the picture: training falls steeply at first

/**
 * A figure with a title: {element, update(lines), end()}.
 * A line is {label, points: [[step, value], …], noisy}; a noisy one is drawn faintly under its moving average.
 */
export function figure(title) {
  const legend = h("span", { class: "curve-legend" });
  const drawing = svg("svg", { class: "curve", role: "img", height: HEIGHT });
  const element = h("figure", { class: "curves", data: { testid: "curve", title } },
    h("figcaption", {}, h("strong", { text: title }), legend), drawing);
  let lines = [];
  let at = null; // the step that the pointer is at

  const draw = () => {
    const plot = layout(lines, drawing.clientWidth);
    drawing.replaceChildren(...(plot ? shapes(plot, at) : []));
    legend.replaceChildren(...lines.map((line, index) => entry(line, index, at)), ...step(lines, at));
    drawing.setAttribute("aria-label", spoken(title, lines));
    drawing.plot = plot;
  };
  drawing.addEventListener("pointermove", (event) => {
    at = drawing.plot ? nearest(lines, drawing.plot.toStep(event.offsetX)) : null;
    draw();
  });
  drawing.addEventListener("pointerleave", () => { at = null; draw(); });
  const watcher = new ResizeObserver(draw);
  watcher.observe(drawing);
  return {
    element,
    update(given) { lines = given.filter((line) => line.points.length); draw(); },
    end() { watcher.disconnect(); },
  };
}

// ---- from numbers to places ----

/** What is to be drawn, and where: null where there is nothing. */
function layout(lines, width) {
  if (!lines.length || width < 2 * MARGIN.left) return null;
  const shown = lines.map((line) => ({ ...line, calm: thin(line.noisy ? smooth(line.points) : line.points) }));
  const steps = lines.flatMap((line) => [line.points[0][0], line.points.at(-1)[0]]);
  const x = axis(Math.min(...steps), Math.max(...steps), MARGIN.left, width - MARGIN.right);
  const noise = (line) => (line.noisy ? usual(settled(thin(line.points))) : []);
  const values = shown.flatMap((line) => [...settled(line.calm), ...noise(line)]);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = 0.07 * (high - low) || 0.05 * Math.abs(high) || 0.05;
  const y = axis(low - room, high + room, HEIGHT - MARGIN.bottom, MARGIN.top);
  return { width, lines: shown, x, y, toStep: x.back };
}

function settled(points) {
  return points.slice(Math.floor(points.length / UNSETTLED)).map(([, value]) => value);
}

/** Numbers without the few that lie far out. */
function usual(values) {
  const few = Math.floor(values.length / 50);
  return [...values].sort((one, other) => one - other).slice(few, values.length - few);
}

/** A scale from numbers to pixels, with the round numbers on it. */
function axis(low, high, from, to) {
  const span = high - low || 1;
  const place = (value) => from + ((value - low) / span) * (to - from);
  const back = (pixel) => low + ((pixel - from) / (to - from)) * span;
  const ticks = roundNumbers(low, high, Math.max(2, Math.abs(to - from) / (from < to ? 70 : 36)));
  const tells = (digits) => new Set(ticks.map((value) => told(value, digits))).size === ticks.length;
  return { place, back, ticks, digits: [3, 4].find(tells) ?? 6 };
}

/** Multiples of 1, 2 or 5 times a power of ten between two numbers, about so many. */
export function roundNumbers(low, high, count) {
  const rough = (high - low) / count;
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const width = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= rough);
  const first = Math.ceil(low / width);
  const found = [];
  for (let number = first; number * width <= high; number += 1) found.push(number * width + 0); // + 0: no -0
  return found;
}

/** The moving average of neighbours, as many as a part of the line. */
export function smooth(points) {
  const half = Math.floor(points.length / WINDOW / 2);
  const sums = [0];
  for (const [, value] of points) sums.push(sums.at(-1) + value);
  return points.map(([step], place) => {
    const [from, to] = [Math.max(0, place - half), Math.min(points.length, place + half + 1)];
    return [step, (sums[to] - sums[from]) / (to - from)];
  });
}

/** At most MOST_POINTS points: means of equal runs of neighbours. */
export function thin(points) {
  if (points.length <= MOST_POINTS) return points;
  const edge = (place) => Math.round((place * points.length) / MOST_POINTS);
  return Array.from({ length: MOST_POINTS }, (_, place) => {
    const group = points.slice(edge(place), edge(place + 1));
    return [group.at(-1)[0], group.reduce((sum, [, value]) => sum + value, 0) / group.length];
  });
}

/** The step, among all that were logged, that is closest to a number. */
function nearest(lines, wanted) {
  const steps = lines.flatMap((line) => line.points.map(([step]) => step));
  return steps.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best), steps[0]);
}

// ---- from places to shapes ----

function shapes(plot, at) {
  const { width, x, y } = plot;
  const right = width - MARGIN.right;
  const bottom = HEIGHT - MARGIN.bottom;
  const grid = y.ticks.flatMap((value) => [
    svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y.place(value), y2: y.place(value) }),
    label(MARGIN.left - 8, y.place(value) + 4, value, "end", y.digits),
  ]);
  const steps = x.ticks.map((value) => label(x.place(value), HEIGHT - 6, value, "middle", x.digits));
  const [start, wide] = [MARGIN.left - EDGE, right - MARGIN.left + 2 * EDGE]; // what is beyond is cut off
  const shapes = plot.lines.flatMap((line, index) => drawn(line, index, plot));
  const box = { x: start, width: wide, height: bottom, viewBox: `${start} 0 ${wide} ${bottom}` };
  const inside = svg("svg", box, ...shapes);
  const stands = () => svg("line", { class: "pointer", x1: x.place(at), x2: x.place(at), y1: MARGIN.top, y2: bottom });
  const pointer = at === null ? [] : [stands()];
  return [...grid, ...steps, inside, ...pointer];
}

function label(x, y, value, anchor, digits) {
  return svg("text", { x, y, "text-anchor": anchor, text: told(value, digits) });
}

function drawn(line, index, { x, y }) {
  const place = ([step, value]) => `${x.place(step).toFixed(1)} ${y.place(value).toFixed(1)}`;
  const path = (points) => points.map((point, n) => `${n ? "L" : "M"}${place(point)}`).join("");
  const shape = [svg("path", { class: `line line-${index % 4}`, d: path(line.calm) })];
  if (line.noisy) shape.unshift(svg("path", { class: `line faint line-${index % 4}`, d: path(thin(line.points)) }));
  if (line.points.length <= 40 && !line.noisy) {
    const dot = ([step, value]) => ({ class: `dot line-${index % 4}`, cx: x.place(step), cy: y.place(value), r: 2.5 });
    shape.push(...line.points.map((point) => svg("circle", dot(point))));
  }
  return shape;
}

/** A line's name with its value at the pointer, else its last one. */
function entry(line, index, at) {
  const point = at === null ? line.points.at(-1) : line.points.find(([step]) => step === at);
  const value = h("b", { text: point ? told(point[1], 4) : "–" });
  return h("span", { class: `line-${index % 4}` }, line.label && `${line.label} `, value);
}

function step(lines, at) {
  const last = Math.max(...lines.map((line) => line.points.at(-1)[0]));
  return lines.length ? [h("span", { class: "muted", text: t("runs_step", { n: told(at ?? last, 9) }) })] : [];
}

function spoken(title, lines) {
  const course = lines.map(({ label: name, points }) => `${name} ${told(points[0][1])} → ${told(points.at(-1)[1])}`);
  return `${title}: ${course.join(", ")}`;
}

/** A number in few characters: 12,500 as 12.5K, 0.000625 as 6.25E-4. */
function told(value, digits = 3) {
  const size = Math.abs(value);
  const notation = size >= 5_000 && digits < 7 ? "compact" : size && size < 0.001 ? "scientific" : "standard";
  return new Intl.NumberFormat(language, { notation, maximumSignificantDigits: digits }).format(value);
}
