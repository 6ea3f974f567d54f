const root = element.querySelector(".landscape");
function render() { root.textContent = (props.value || {}).message || (props.value || {}).caption || ""; }
watch("value", render);
render();
