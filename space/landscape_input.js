// What a visitor does with the landscape: pointing, choosing, moving, zooming, and walking with the keyboard. The second
// half of the script that begins with landscape.js.
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
