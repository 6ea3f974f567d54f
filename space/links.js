// Buttons inside HTML that Python made: each says by its data what was chosen. What a visitor opened gets the focus.
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-kind]");
  if (button) trigger("select", { index: button.dataset.kind, value: button.dataset.value });
});

watch("value", () => {
  const heading = element.querySelector("[data-focus]");
  if (!heading) return;
  heading.focus({ preventScroll: true });
  heading.scrollIntoView({ block: "nearest" });
});
