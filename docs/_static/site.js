// An explorer's slider shows the state that it stands on, and hides the others.
for (const explorer of document.querySelectorAll(".explorer")) {
  const label = explorer.querySelector("label");
  const slider = label.querySelector("input");
  const states = [...explorer.querySelectorAll(".state")];
  slider.addEventListener("focus", () => {
    for (const image of explorer.querySelectorAll("img")) image.loading = "eager";
  });
  slider.addEventListener("input", () => {
    states.forEach((state, number) => { state.hidden = number !== Number(slider.value); });
    const { value } = states[slider.value].dataset;
    label.querySelector("output").textContent = value;
    slider.setAttribute("aria-valuetext", value);
  });
  label.hidden = false;
}

// What scrolls sideways can be reached by key.
function reachable() {
  for (const box of document.querySelectorAll("pre, .table-wrapper, .cell_output, .explorer")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}
addEventListener("load", reachable);
addEventListener("resize", reachable);
