// Links to a neuron (#/neuron/ID) and to an inspection (#/inspect?…): told to Python when the page opens and when the
// address changes. What stands after # is not sent to any server by the browser.
function follow() {
  const fragment = window.location.hash;
  if (fragment.startsWith("#/neuron/")) trigger("select", { index: "neuron", value: fragment });
  if (fragment.startsWith("#/inspect?")) trigger("submit", { value: fragment });
}

window.addEventListener("hashchange", follow);
follow();
