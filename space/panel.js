// Close gives the focus back to what opened the neuron, where that is still there: its button or the landscape; else
// to the tab. This is a script of the card, whose heading had the focus.
function opener() {
  const tab = element.closest('[role="tabpanel"]');
  const name = element.querySelector("article")?.dataset.neuron;
  const buttons = [...tab.querySelectorAll('button[data-kind="neuron"]')];
  const button = buttons.find(({ dataset }) => dataset.value === name) || tab.querySelector("#landscape .plot");
  return button || document.querySelector('[role="tab"][aria-selected="true"]');
}

element.closest('[id$="-panel"]').querySelector(".close").addEventListener("click", () => opener()?.focus());
