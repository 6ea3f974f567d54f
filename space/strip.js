// The token strip: one button a token, in a toolbar that the arrow keys walk through.
// Tokens are set as text nodes and attributes here, and never pass through gradio's HTML template: its output is
// evaluated as JavaScript, so that a token like `${…}` would run.
const strip = element.querySelector(".strip");

function tokenButton(token, index) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = ["token", token.special && "special", token.gap && "gap", token.blank && "blank"].filter(Boolean).join(" ");
  button.textContent = token.text;
  button.title = token.label;
  button.setAttribute("aria-label", token.label);
  button.dataset.index = index;
  button.style.setProperty("--strength", token.strength);
  if (token.value) button.dataset.value = token.value;
  return button;
}

// The way a token's letters run. Digits run left to right in every script, a token without letters as those before it.
function direction({ text, special }) {
  if (special || !/[\p{L}\p{N}]/u.test(text)) return "";
  return /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/.test(text) && !/\p{N}/u.test(text) ? "rtl" : "ltr";
}

function appended(parent, tag, className) {
  const child = parent.appendChild(document.createElement(tag));
  child.className = className;
  return child;
}

// Buttons do not take part in the browser's ordering of mixed scripts, so that runs of one direction are made here.
function sectionOf({ name, first, tokens }) {
  const section = document.createElement("div");
  section.className = `section ${name.toLowerCase()}`;
  section.setAttribute("role", "group");
  section.setAttribute("aria-label", `${name}, ${tokens.length} tokens`);
  appended(section, "div", "heading").textContent = `${name} · ${tokens.length} tokens`;
  let line = null;
  let run = null;
  tokens.forEach((token, i) => {
    const way = direction(token);
    if (!line) [line, run] = [appended(section, "div", "line"), null];
    if (way && !line.dir) line.dir = way;
    if (!run || (way && run.dir && way !== run.dir)) run = appended(line, "span", "run");
    if (way) run.dir = way;
    run.append(tokenButton(token, first + i));
    if (token.ends_line) line = null;
  });
  return section;
}

function buttons() {
  return [...strip.querySelectorAll("button")];
}

function mark(index) {
  for (const [i, button] of buttons().entries()) {
    button.setAttribute("aria-pressed", i === index);
    button.tabIndex = i === index ? 0 : -1;
  }
}

function marked() {
  return buttons().findIndex((button) => button.getAttribute("aria-pressed") === "true");
}

function select(index) {
  mark(index);
  trigger("select", { index, value: index });
}

// Other colours leave the selected token as it is: its click may be newer than they are. What is shown of it is asked
// for under the filters of now.
function render() {
  const { sections = [], selected = 0, message = "", recoloured = 0 } = props.value || {};
  const clicked = marked();
  const focused = buttons().indexOf(document.activeElement);
  strip.replaceChildren(...sections.map(sectionOf));
  if (!sections.length) strip.textContent = message;
  mark(recoloured && clicked >= 0 ? clicked : selected);
  if (!recoloured) return;
  select(marked());
  buttons()[focused]?.focus({ preventScroll: true }); // the button that had it is gone
}

strip.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  select(Number(button.dataset.index));
});

strip.addEventListener("keydown", (event) => {
  const all = buttons();
  const next = neighbour(all, all.indexOf(document.activeElement), event.key);
  if (!next) return;
  event.preventDefault();
  next.focus();
});

// gradio submits on Shift-Enter only.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || !event.target.closest("#prompt")) return;
  event.preventDefault();
  document.querySelector("#run").click();
});

watch("value", render);
render();
