"use strict";
(() => {
  const characters = JSON.parse(document.getElementById("characters").textContent);
  const details = document.getElementById("details");
  const pads = [...document.querySelectorAll(".pad")].map((pad) => [...pad.querySelectorAll("span")]);
  const where = new Map();
  pads.forEach((spans, pad) => spans.forEach((span, index) => where.set(span, [pad, index])));
  let shown = null;

  const element = (name, text = "") => Object.assign(document.createElement(name), { textContent: text });
  const visible = (character) => ({ "\n": "↵", " ": "␣" })[character] ?? character;
  const percent = (share) => (share >= 0.00005 ? `${(100 * share).toFixed(2)} %` : "< 0.01 %");

  function show(span) {
    if (span === shown) return;
    shown?.classList.remove("shown");
    shown = span;
    span.classList.add("shown");
    const [pad, index] = where.get(span);
    const [certainty, entropy, probability, reference, likeliest, shares] = characters[pad][index];
    const glyph = element("div", visible(span.textContent));
    glyph.className = "glyph";
    const list = element("dl");
    const note = span.classList.contains("critical") ? ", a critical token" : "";
    const rows = {
      position: `${index}${note}`,
      certainty: certainty.toFixed(4),
      entropy: `${entropy.toFixed(3)} nats`,
      "probability, policy": percent(probability),
      "probability, pre-trained": percent(reference),
    };
    for (const [name, value] of Object.entries(rows)) list.append(element("dt", name), element("dd", value));
    const bars = element("ol");
    [...likeliest].forEach((character, rank) => {
      const row = element("li", visible(character));
      const bar = element("i");
      bar.style.setProperty("--share", `${100 * shares[rank]}%`);
      row.append(bar, element("b", percent(shares[rank])));
      bars.append(row);
    });
    bars.setAttribute("aria-label", "The policy's likeliest characters");
    details.replaceChildren(glyph, list, bars);
  }

  function inLine(span, step) {
    const line = span.closest(".line");
    const next = step > 0 ? line.nextElementSibling : line.previousElementSibling;
    const [here, there] = [line, next].map((found) => [...(found?.querySelectorAll("span") ?? [])]);
    return there[Math.min(here.indexOf(span), there.length - 1)];
  }

  for (const kind of ["pointerover", "focusin", "click"])
    document.addEventListener(kind, (event) => where.has(event.target) && show(event.target));
  document.addEventListener("keydown", (event) => {
    if (!where.has(event.target)) return;
    const [pad, index] = where.get(event.target);
    const target = {
      ArrowRight: pads[pad][index + 1],
      ArrowLeft: pads[pad][index - 1],
      ArrowDown: inLine(event.target, 1),
      ArrowUp: inLine(event.target, -1),
      Home: pads[pad][0],
      End: pads[pad].at(-1),
    }[event.key];
    if (!target) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  });
})();
