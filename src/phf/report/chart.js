"use strict";
// Charts: the value under the pointer, values by arrow keys, lines that can be hidden, a logarithmic axis.
(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);
  const say = (circle) => {
    document.querySelectorAll(".hit.on").forEach((other) => other.classList.remove("on"));
    tip.hidden = !circle;
    if (!circle) return;
    circle.classList.add("on");
    tip.textContent = circle.dataset.said;
    const box = circle.getBoundingClientRect();
    const left = box.left + window.scrollX + box.width / 2 - tip.offsetWidth / 2;
    tip.style.left = `${Math.max(4, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${box.top + window.scrollY - tip.offsetHeight - 4}px`;
  };
  for (const circle of document.querySelectorAll(".hit")) { // our own note in the place of the browser's slow one
    const title = circle.querySelector("title");
    circle.dataset.said = title.textContent;
    title.remove();
  }
  for (const chart of document.querySelectorAll(".chart")) {
    chart.setAttribute("role", "group");
    const name = chart.querySelector("svg").getAttribute("aria-label");
    chart.setAttribute("aria-label", `${name}. Arrow keys read its values.`);
    const circles = () => [...chart.querySelectorAll(":scope > div:not([hidden]) .hit:not(.off)")];
    chart.addEventListener("pointerover", (event) => say(event.target.closest(".hit")));
    chart.addEventListener("pointerleave", () => say(null));
    chart.addEventListener("blur", () => say(null));
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") say(null);
      if (!step) return;
      event.preventDefault();
      const all = circles();
      const now = all.findIndex((circle) => circle.classList.contains("on"));
      const from = now < 0 && step < 0 ? 0 : now; // without one, the first or the last
      if (all.length) say(all[(from + step + all.length) % all.length]);
    });
    const legend = chart.nextElementSibling;
    if (!legend?.classList.contains("legend")) continue;
    legend.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      say(null);
      if (button.classList.contains("scale")) {
        chart.querySelector(".log").hidden = !on;
        chart.querySelector(".linear").hidden = on;
        return;
      }
      for (const part of chart.querySelectorAll(`.s${button.dataset.series}`)) part.classList.toggle("off", !on);
    });
    legend.hidden = false;
  }
})();
