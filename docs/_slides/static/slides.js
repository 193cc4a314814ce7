// One slide at a time, by arrow keys, Space, Home and End, or the two buttons. The fuller
// a slide, the smaller its type, from 30 to 11 pixels; below 18, figures stand beside the text that
// was printed with them; what is fuller still scrolls.
const slides = [...document.querySelectorAll(".slide")];
const nav = document.querySelector("nav");
const status = nav.querySelector("span");
let now = 0;

function show(number, focus = true) {
  now = Math.max(0, Math.min(slides.length - 1, number));
  slides.forEach((slide, n) => slide.classList.toggle("now", n === now));
  status.textContent = ` ${now + 1} / ${slides.length} `;
  history.replaceState(null, "", `#${now + 1}`);
  if (focus) slides[now].focus({ preventScroll: true });
}

function fit(slide) {
  if (!document.body.classList.contains("stage")) return;
  for (const [beside, smallest] of [[false, 18], [true, 11]]) {
    slide.classList.toggle("beside", beside);
    for (let size = 30; size >= smallest; size -= 1) {
      slide.style.fontSize = `${size}px`;
      if (slide.scrollHeight <= slide.clientHeight) return;
    }
  }
}

function arrange() {
  const wide = innerWidth >= 700;
  document.body.classList.toggle("stage", wide);
  nav.hidden = !wide;
  const scale = Math.min(innerWidth / 1280, innerHeight / 720);
  document.body.style.setProperty("--scale", scale);
  for (const slide of slides) {
    slide.tabIndex = wide ? -1 : 0;
    if (wide && !slide.style.fontSize) fit(slide);
    if (!wide) {
      slide.style.fontSize = "";
      slide.classList.remove("beside");
    }
  }
}

const STEPS = { ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1 };
addEventListener("keydown", (event) => {
  if (nav.hidden || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.matches("input") || (event.target.matches("button") && event.key === " ")) return;
  if (event.key in STEPS) show(now + STEPS[event.key] * (event.shiftKey ? -1 : 1));
  else if (event.key === "Home") show(0);
  else if (event.key === "End") show(slides.length - 1);
  else return;
  event.preventDefault();
});
for (const button of nav.querySelectorAll("button")) {
  button.addEventListener("click", () => show(now + Number(button.dataset.step), false));
}
addEventListener("resize", arrange);
addEventListener("hashchange", () => show(Number(location.hash.slice(1)) - 1));
for (const image of document.querySelectorAll(".slide img")) {
  image.loading = "eager"; // the explorers' wait until they are looked at
  image.addEventListener("load", () => fit(image.closest(".slide")));
}
addEventListener("load", () => {
  arrange();
  show(Number(location.hash.slice(1) || 1) - 1, false);
});
