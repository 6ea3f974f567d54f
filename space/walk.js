// Where an arrow key leads among buttons that flow in lines: to the next one, or to the nearest of the line above or below.
function neighbour(all, i, key) {
  const steps = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: all.length - 1 };
  if (key in steps) return all[steps[key]];
  const here = all[i].getBoundingClientRect();
  const side = { ArrowDown: (box) => box.top > here.bottom - 2, ArrowUp: (box) => box.bottom < here.top + 2 }[key];
  if (!side) return undefined;
  const distance = (box) => 1000 * Math.abs(box.top - here.top) + Math.abs(box.left - here.left);
  const there = all.map((button) => [button, button.getBoundingClientRect()]).filter(([, box]) => side(box));
  return there.sort((a, b) => distance(a[1]) - distance(b[1]))[0]?.[0];
}
