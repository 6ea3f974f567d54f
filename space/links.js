// Buttons inside HTML that Python made: each says by its data what was chosen. What a visitor opened gets the focus.
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-kind]");
  if (button) trigger("select", { index: button.dataset.kind, value: button.dataset.value });
});

function focusOpened() {
  const heading = element.querySelector("[data-focus]");
  if (!heading) return;
  heading.focus({ preventScroll: true });
  heading.scrollIntoView({ block: "nearest" });
}

watch("value", focusOpened);
focusOpened(); // a panel that was closed is made anew, with what it shows
