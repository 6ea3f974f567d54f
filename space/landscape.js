// The landscape: a scatter plot with one SVG path a domain, so that thousands of marks move as a few shapes.
// Text is set as text nodes only. Every listener sits on an element of the plot, and none is left behind with it.
const root = element.querySelector(".landscape");
const SVG = "http://www.w3.org/2000/svg";
const MARGIN = 20; // pixels between the outermost points and the plot's edge
const MAX_ZOOM = 40;
const STEP = 1.5; // of a zoom button or key
const REACH = { mouse: 14, touch: 26 }; // pixels around a point that count as the point
const STILL = 6; // pixels that a finger may move and still be a click
const AT_ONCE = 1000; // marks that are made anew in every frame of a zoom; more are stretched until it rests
const REST = 150; // milliseconds
const N_COLOURS = 5;

// Each shape as path commands from the mark's middle; r is its size in pixels. The cross is for no domain.
const SHAPES = [
  (r) => `m${-r},0a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0z`,
  (r) => `m${-0.88 * r},${-0.88 * r}h${1.76 * r}v${1.76 * r}h${-1.76 * r}z`,
  (r) => `m0,${-1.2 * r}l${1.15 * r},${2 * r}h${-2.3 * r}z`,
  (r) => `m0,${-1.3 * r}l${1.3 * r},${1.3 * r}l${-1.3 * r},${1.3 * r}l${-1.3 * r},${-1.3 * r}z`,
  (r) => `m0,${1.2 * r}l${1.15 * r},${-2 * r}h${-2.3 * r}z`,
  (r) => `m${-1.15 * r},${-0.6 * r}h${2.3 * r}v${1.2 * r}h${-2.3 * r}z`,
];
const CROSS = (r) => `m${-0.75 * r},${-0.75 * r}l${1.5 * r},${1.5 * r}m0,${-1.5 * r}l${-1.5 * r},${1.5 * r}`;

const off = new Set(); // ids of the domains that are switched off
const camera = { zoom: 1, x: 0, y: 0 }; // the pan in pixels
const fingers = new Map(); // {pointer id: its place}
let data = { points: [], domains: [] };
let box = {}; // the middle of the points, and half their extent
let drawnAs = []; // the place in data.domains that each point is drawn as; -1 for a hidden one
let active = -1; // the point whose label is shown
let last = -1; // the point whose label was shown last: the keyboard goes on from there
let opened = ""; // the id of the neuron whose card was opened here
let travelled = 0;
let asked = 0; // the animation frame that will draw
let painted = null; // the scale and the size that the marks were made for
let resting = 0; // the timer that makes them anew
let parts = {};

// --- making the elements --------------------------------------------------------------------------------------------

function child(parent, tag, attributes = {}, text = "") {
  const made = parent.namespaceURI === SVG || tag === "svg" ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return parent.appendChild(made);
}

function look(i) {
  const none = data.domains[i].id === "";
  return { stamp: none ? CROSS : SHAPES[i % SHAPES.length], class: none ? "none" : `colour-${i % N_COLOURS}` };
}

function makeLegend(bar) {
  const legend = child(bar, "div", { class: "legend", role: "group", "aria-label": "Domains that are drawn" });
  data.domains.forEach(({ id, title }, i) => {
    const count = data.points.filter(([, , , domains]) => domains.includes(i)).length;
    if (!count) return;
    const button = child(legend, "button", { type: "button", "aria-pressed": !off.has(id) });
    const mark = child(button, "svg", { viewBox: "-8 -8 16 16", width: 16, height: 16, "aria-hidden": true });
    child(mark, "path", { class: look(i).class, d: `M0,0${look(i).stamp(5.5)}` });
    child(button, "span", {}, title);
    child(button, "span", { class: "count" }, count.toLocaleString("en"));
    button.addEventListener("click", () => toggle(button, id));
  });
}

function makePlot() {
  const names = { "aria-label": data.caption, "aria-describedby": "landscape-note", "aria-roledescription": "scatter plot" };
  const plot = child(root, "div", { class: "plot", tabindex: 0, role: "application", ...names });
  const marks = child(plot, "svg", { class: "marks", "aria-hidden": true }); // its origin is the plot's middle
  const under = data.domains.map((_, i) => i).sort((a, b) => !data.domains[b].id - !data.domains[a].id);
  const paths = [];
  for (const i of under) paths[i] = child(marks, "path", { class: look(i).class, "data-domain": data.domains[i].id });
  const over = child(plot, "svg", { class: "over", "aria-hidden": true });
  const rings = [child(over, "circle", { class: "ring opened" }), child(over, "circle", { class: "ring" })];
  const label = child(plot, "div", { class: "label", role: "status" });
  parts = { plot, marks, paths, rings, label };
  listen(plot);
}

function makeZoom(bar) {
  const group = child(bar, "div", { class: "zoom", role: "group", "aria-label": "Zoom" });
  const buttons = [["+", "Zoom in", STEP], ["−", "Zoom out", 1 / STEP], ["Reset", "Show the whole landscape", 0]];
  for (const [text, name, factor] of buttons) {
    const button = child(group, "button", { type: "button", "aria-label": name, title: name }, text);
    button.addEventListener("click", () => (factor ? zoomAt(factor, 0, 0) : reset()));
  }
}

function makeNote() {
  const note = child(root, "p", { class: "note-line", id: "landscape-note" });
  parts.count = child(note, "span", { class: "shown" });
  child(note, "span", {}, ` ${data.note} Drag to move; Ctrl and the wheel, + and − zoom. With the keyboard: the arrow keys `
    + "walk from neuron to neuron, Home and End go to the first and the last, Enter opens the card.");
}

function render() {
  data = { points: [], domains: [], ...JSON.parse(props.value) };
  [parts, active, last, painted] = [{}, -1, -1, null];
  root.replaceChildren();
  child(root, "p", { class: "caption" }, data.message || data.caption);
  if (!data.points.length) return;
  box = boxOf(data.points);
  const bar = child(root, "div", { class: "bar" });
  makeLegend(bar);
  makeZoom(bar);
  makePlot();
  makeNote();
  assign();
  new ResizeObserver(redraw).observe(parts.plot);
}

// --- where things are -----------------------------------------------------------------------------------------------

function boxOf(points) {
  const [xs, ys] = [points.map(([, x]) => x), points.map(([, , y]) => y)];
  const range = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
  const [[left, right], [low, high]] = [range(xs), range(ys)];
  return { x: (left + right) / 2, y: (low + high) / 2, width: right - left, height: high - low };
}

// Pixels to a unit of the coordinates, the same on both axes.
function scale() {
  const { clientWidth: width, clientHeight: height } = parts.plot;
  const fits = [[width, box.width], [height, box.height]].filter(([, extent]) => extent > 0);
  const least = Math.min(...fits.map(([pixels, extent]) => Math.max(pixels - 2 * MARGIN, 1) / extent));
  return (fits.length ? least : 1) * camera.zoom;
}

// From the plot's middle, in pixels, before the pan.
function placeOf(i, unit = scale()) {
  const [, x, y] = data.points[i];
  return [(x - box.x) * unit, (box.y - y) * unit];
}

function screenOf(i) {
  const [x, y] = placeOf(i);
  return [x + camera.x + parts.plot.clientWidth / 2, y + camera.y + parts.plot.clientHeight / 2];
}

function fromMiddle(event) {
  const { left, top } = parts.plot.getBoundingClientRect();
  const [x, y] = [event.clientX - left - parts.plot.clientLeft, event.clientY - top - parts.plot.clientTop];
  return [x - parts.plot.clientWidth / 2, y - parts.plot.clientHeight / 2];
}

function markSize() {
  const each = Math.sqrt((parts.plot.clientWidth * parts.plot.clientHeight) / data.points.length);
  return Math.min(Math.max(0.13 * each, 3), 6.5) * Math.min(camera.zoom ** 0.25, 2);
}

function nearest(x, y, reach) {
  const unit = scale();
  let [best, distance] = [-1, reach];
  for (let i = 0; i < data.points.length; i++) {
    if (drawnAs[i] < 0) continue;
    const [px, py] = placeOf(i, unit);
    const d = Math.hypot(px + camera.x - x, py + camera.y - y);
    if (d < distance) [best, distance] = [i, d];
  }
  return best;
}

// --- drawing --------------------------------------------------------------------------------------------------------

// A neuron of several domains is drawn as the first that is switched on.
function assign() {
  drawnAs = data.points.map(([, , , domains]) => domains.find((i) => !off.has(data.domains[i].id)) ?? -1);
  const n = drawnAs.filter((i) => i >= 0).length;
  parts.count.textContent = `${n.toLocaleString("en")} of ${data.points.length.toLocaleString("en")} neurons drawn.`;
  painted = null;
  if (active >= 0 && drawnAs[active] < 0) show(-1);
  redraw();
}

function redraw() {
  asked ||= requestAnimationFrame(draw);
}

function draw() {
  asked = 0;
  if (!parts.plot?.clientWidth) return;
  if (!painted || data.points.length <= AT_ONCE) paint();
  else if (painted.unit !== scale() || painted.r !== markSize()) paintAtRest();
  const stretch = painted.unit === scale() ? "" : ` scale(${scale() / painted.unit})`;
  parts.marks.style.transform = `translate(${camera.x.toFixed(1)}px, ${camera.y.toFixed(1)}px)${stretch}`;
  parts.plot.classList.toggle("zoomed", camera.zoom > 1);
  ring(parts.rings[0], data.points.findIndex(([id]) => id === opened));
  ring(parts.rings[1], active);
  putLabel();
}

function paintAtRest() {
  clearTimeout(resting);
  resting = setTimeout(() => {
    painted = null;
    redraw();
  }, REST);
}

function paint() {
  const [unit, r] = [scale(), markSize()];
  if (painted?.unit === unit && painted.r === r) return;
  painted = { unit, r };
  const stamps = data.domains.map((_, i) => look(i).stamp(r).replace(/\d+\.\d{3,}/g, (text) => Number(text).toFixed(2)));
  const drawn = data.domains.map(() => []);
  drawnAs.forEach((domain, i) => {
    if (domain < 0) return;
    const [x, y] = placeOf(i, unit);
    drawn[domain].push(`M${x.toFixed(1)},${y.toFixed(1)}${stamps[domain]}`);
  });
  drawn.forEach((marks, i) => parts.paths[i].setAttribute("d", marks.join("")));
}

function ring(circle, i) {
  circle.style.display = i < 0 || drawnAs[i] < 0 ? "none" : "";
  if (i < 0) return;
  const [x, y] = screenOf(i);
  for (const [name, value] of Object.entries({ cx: x, cy: y, r: markSize() + 4 })) circle.setAttribute(name, value);
}

function putLabel() {
  if (active < 0) return;
  const { plot, label } = parts;
  const [x, y] = screenOf(active);
  const beside = (at, size, room) => Math.max(4, Math.min(at + 14 + size > room ? at - 14 - size : at + 14, room - size - 4));
  label.style.left = `${beside(x, label.offsetWidth, plot.clientWidth)}px`;
  label.style.top = `${beside(y, label.offsetHeight, plot.clientHeight)}px`;
}

// --- what a visitor does ----------------------------------------------------------------------------------------------

function show(i) {
  if (i === active) return;
  active = i;
  parts.label.replaceChildren();
  parts.plot.classList.toggle("pointing", i >= 0);
  if (i >= 0) {
    last = i;
    const [id, , , domains, text, score] = data.points[i];
    child(parts.label, "strong", { dir: "auto" }, text);
    child(parts.label, "code", {}, id);
    child(parts.label, "span", {}, domains.map((at) => data.domains[at].title).join(", "));
    child(parts.label, "span", {}, `Score ${score}`);
  }
  redraw();
}

function open(i) {
  if (i < 0) return;
  opened = data.points[i][0];
  trigger("select", { index: "neuron", value: opened });
  redraw();
}

function toggle(button, id) {
  if (!off.delete(id)) off.add(id);
  button.setAttribute("aria-pressed", !off.has(id));
  assign();
}

function zoomAt(factor, x, y) {
  const zoom = Math.min(Math.max(camera.zoom * factor, 1), MAX_ZOOM);
  const grown = zoom / camera.zoom;
  camera.zoom = zoom;
  panTo(x - (x - camera.x) * grown, y - (y - camera.y) * grown);
}

// The plot's middle stays within the points' extent, so that they cannot be lost.
function panTo(x, y) {
  const limit = (value, extent) => Math.min(Math.max(value, (-extent * scale()) / 2), (extent * scale()) / 2);
  [camera.x, camera.y] = [limit(x, box.width), limit(y, box.height)];
  redraw();
}

function reset() {
  camera.zoom = 1;
  panTo(0, 0);
}

// The nearest point in a direction: within its quarter of the plane, else anywhere on that side. Points in the same
// place follow each other in their order.
function inDirection(from, [dx, dy]) {
  const [x, y] = placeOf(from, 1);
  let best = { side: 3, distance: Infinity, i: from };
  data.points.forEach((_, i) => {
    if (i === from || drawnAs[i] < 0) return;
    const [px, py] = placeOf(i, 1);
    const [along, across] = [(px - x) * dx + (py - y) * dy, Math.abs((px - x) * dy) + Math.abs((py - y) * dx)];
    const same = along === 0 && across === 0;
    if (same ? (i - from) * (dx + dy) < 0 : along <= 0) return;
    const [side, distance] = [across <= along ? 1 : 2, same ? Math.abs(i - from) * 1e-9 : Math.hypot(along, across)];
    if (side < best.side || (side === best.side && distance < best.distance)) best = { side, distance, i };
  });
  return best.i;
}

function first() {
  return drawnAs.findIndex((i) => i >= 0);
}

function bring(i) {
  if (i < 0) return;
  show(i);
  const [x, y] = screenOf(i);
  const inside = x > 0 && y > 0 && x < parts.plot.clientWidth && y < parts.plot.clientHeight;
  if (!inside) panTo(...placeOf(i).map((value) => -value));
}

// Shows the point where the visitor was, or the first.
function resume() {
  bring(drawnAs[last] >= 0 ? last : first());
}

function onKey(event) {
  const directions = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const actions = {
    Home: () => bring(first()),
    End: () => bring(drawnAs.findLastIndex((i) => i >= 0)),
    Enter: () => open(active),
    " ": () => open(active),
    Escape: () => show(-1),
    "+": () => zoomAt(STEP, 0, 0),
    "-": () => zoomAt(1 / STEP, 0, 0),
    0: reset,
  };
  const way = directions[event.key];
  const act = way ? () => (active < 0 ? resume() : bring(inDirection(active, way))) : actions[event.key];
  if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act();
}

function onWheel(event) {
  if (!event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  const turned = event.deltaY * (event.deltaMode ? 16 : 1);
  zoomAt(2 ** (-Math.min(Math.max(turned, -50), 50) / 100), ...fromMiddle(event));
}

function onDown(event) {
  if (event.button) return;
  if (!fingers.size) travelled = 0;
  fingers.set(event.pointerId, fromMiddle(event));
  parts.plot.setPointerCapture(event.pointerId);
}

function onMove(event) {
  const here = fromMiddle(event);
  const before = fingers.get(event.pointerId);
  if (!before) return show(nearest(...here, REACH.mouse));
  fingers.set(event.pointerId, here);
  const [dx, dy] = [here[0] - before[0], here[1] - before[1]];
  travelled += Math.abs(dx) + Math.abs(dy);
  if (fingers.size === 2) return pinch(event.pointerId, before, here);
  if (travelled >= STILL) panTo(camera.x + dx, camera.y + dy);
}

// Two fingers: what lies under the resting one stays there.
function pinch(id, before, here) {
  const [, rest] = [...fingers].find(([other]) => other !== id);
  const apart = ([x, y]) => Math.max(Math.hypot(x - rest[0], y - rest[1]), 1);
  zoomAt(apart(here) / apart(before), ...rest);
}

function onClick(event) {
  if (travelled >= STILL) return;
  const touch = event.pointerType && event.pointerType !== "mouse";
  const i = event.detail ? nearest(...fromMiddle(event), touch ? REACH.touch : REACH.mouse) : active;
  show(i);
  open(i);
}

function listen(plot) {
  const release = (event) => fingers.delete(event.pointerId);
  plot.addEventListener("pointerdown", onDown);
  plot.addEventListener("pointermove", onMove);
  plot.addEventListener("pointerup", release);
  plot.addEventListener("pointercancel", release);
  plot.addEventListener("pointerleave", () => fingers.size || plot.matches(":focus-visible") || show(-1));
  plot.addEventListener("click", onClick);
  plot.addEventListener("wheel", onWheel, { passive: false });
  plot.addEventListener("keydown", onKey);
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && active < 0 && resume());
  plot.addEventListener("blur", () => show(-1));
}

watch("value", render);
render();
