// Two answers side by side: tokens are walked through and read out, a latent marks the tokens on which it is active.
// All of it is in the page already; nothing is asked of the server.
function tokens(strip) {
  return [...strip.querySelectorAll("button.token")];
}

// The first token of each strip is the one that Tab reaches.
function prepare() {
  for (const strip of element.querySelectorAll(".strip")) tokens(strip)[0]?.setAttribute("tabindex", "0");
}

function read(button) {
  element.querySelector(".reading").textContent = button.title;
}

function unmark() {
  for (const token of element.querySelectorAll(".token.marked")) {
    token.classList.remove("marked");
    delete token.dataset.fires;
  }
}

// Marks the tokens of one side; gives how many, and those that count.
function markSide(section, firings) {
  const found = tokens(section).filter((token) => token.dataset.i in firings);
  for (const token of found) {
    token.classList.add("marked");
    token.dataset.fires = firings[token.dataset.i].toFixed(2);
  }
  const named = found.slice(0, 8).map((token) => `“${token.textContent}” ${token.dataset.fires}`);
  return `${found.length} tokens of the ${section.dataset.side} answer${named.length ? `: ${named.join(", ")}` : ""}`;
}

function mark(button) {
  const pressed = button.getAttribute("aria-pressed") === "true";
  unmark();
  for (const other of element.querySelectorAll("button.latent")) other.setAttribute("aria-pressed", "false");
  const where = element.querySelector(".marked-where");
  where.textContent = "";
  if (pressed) return;
  button.setAttribute("aria-pressed", "true");
  const firings = JSON.parse(button.dataset.firings);
  const said = [...element.querySelectorAll(".side")].map((section) => markSide(section, firings[section.dataset.side]));
  where.textContent = `${button.dataset.latent} is active on ${said.join("; on ")}.`;
}

element.addEventListener("click", (event) => {
  const latent = event.target.closest("button.latent");
  if (latent) mark(latent);
  const token = event.target.closest("button.token");
  if (token) read(token);
});

for (const kind of ["focusin", "mouseover"]) {
  element.addEventListener(kind, (event) => {
    const token = event.target.closest("button.token");
    if (token) read(token);
  });
}

element.addEventListener("keydown", (event) => {
  const strip = event.target.closest(".strip");
  if (!strip) return;
  const all = tokens(strip);
  const next = neighbour(all, all.indexOf(event.target), event.key);
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});

watch("value", prepare);
prepare();
