// Cards of the book: quizzes and guesses answer in the page and are kept in this browser alone.

const kept = {
  get: (key) => { try { return localStorage.getItem("canopyq-" + key); } catch { return null; } },
  set: (key, value) => { try { localStorage.setItem("canopyq-" + key, value); } catch { /* a private window */ } },
};

function say(card, kind, html) {
  card.querySelector(".cq-verdict").innerHTML = html ? `<div class="cq-box cq-${kind}">${html}</div>` : "";
}

function quiz(form) {
  const key = "quiz-" + form.dataset.name;
  const judge = () => {
    const choice = form.querySelector("input:checked");
    if (!choice) return say(form, "info", "Choose an answer first.");
    const reason = form.querySelector(`template[data-choice="${choice.value}"]`);
    const right = reason.dataset.right === "true";
    kept.set(key, choice.value);
    say(form, right ? "good" : "bad", `<b>${right ? "Right." : "Not this one."}</b> ${reason.innerHTML}`);
  };
  form.addEventListener("submit", (event) => { event.preventDefault(); judge(); });
  form.addEventListener("change", () => say(form, "info", "")); // what was said is of another choice
  const before = form.querySelector(`input[value="${kept.get(key)}"]`);
  if (before) { before.checked = true; judge(); }
}

// The number at the start of what was typed, or NaN: 0.5, 0,5, 1/2, 3e-4, 1,000.
function parse(text) {
  text = text.trim().replace("\u2212", "-");
  const fraction = text.match(/^(\d+)\s*\/\s*([1-9]\d*)$/);
  if (fraction) return fraction[1] / fraction[2];
  if (/^[-+]?[1-9]\d{0,2}(,\d{3})+(?![\d,])/.test(text)) text = text.replaceAll(",", "");
  text = text.replace(/(\d)[ _](?=\d{3}\b)/g, "$1");
  if (/^[^.,]*\d,\d+[^.,]*$/.test(text)) text = text.replace(",", ".");
  const number = text.match(/^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?(?![\w.,/]*\d)/);
  return number ? Number(number[0]) : NaN;
}

// How far off, in words: as a share of what was measured, or as a factor.
function distance(guess, value) {
  if (guess === value || (value && Math.abs(guess - value) <= 0.02 * Math.abs(value))) return ". Spot on.";
  if (!(guess * value > 0)) return "";
  const ratio = guess / value;
  const side = ratio > 1 ? "high" : "low";
  const by = ratio > 0.5 && ratio < 2 ? `${Math.round(100 * Math.abs(ratio - 1))}%`
    : `a factor of ${Number(Math.max(ratio, 1 / ratio).toPrecision(3))}`;
  return ` (${by} too ${side})`;
}

function guess(form) {
  const key = "guess-" + form.dataset.name;
  const entry = form.querySelector("input");
  const places = [...document.querySelectorAll(".cq-measured")].filter((it) => it.dataset.name === form.dataset.name);
  const open = (place, number) => {
    const measured = place.querySelector("template").innerHTML;
    const value = parse(place.querySelector("template").content.querySelector("b").textContent);
    place.querySelector(".cq-waiting").hidden = true;
    say(place, "info", number === null ? measured + "."
      : `You said <b>${number}</b>; ${measured.replace("Measured", "measured")}${distance(number, value)}`);
  };
  const keep = (text) => {
    const number = parse(text);
    if (Number.isNaN(number)) return say(form, "bad", "That does not read as a number. Write it as 0.5 or 3e-4.");
    kept.set(key, text);
    say(form, "info", `Your guess: <b>${number}</b>. Now read on.`);
    places.forEach((place) => open(place, number));
  };
  form.addEventListener("submit", (event) => { event.preventDefault(); keep(entry.value); });
  places.forEach((place) => place.querySelector("button").addEventListener("click", () => open(place, null)));
  const before = kept.get(key);
  if (before !== null) { entry.value = before; keep(before); }
}

// What was drawn beforehand, at the places of its controls. Where not every combination was, one control moves at a time.
function explore(card) {
  const { controls, frames, title } = JSON.parse(card.querySelector("script").textContent);
  const at = controls.map((control) => control.start);
  const inputs = controls.map((control, i) => {
    const label = document.createElement("label");
    const input = document.createElement(control.slider ? "input" : "select");
    const shown = document.createElement("output");
    if (control.slider) Object.assign(input, { type: "range", min: 0, max: control.places.length - 1 });
    else control.places.forEach((text, value) => input.add(new Option(text, value)));
    label.append(control.label || "", " ", input, " ", control.slider ? shown : "");
    if (!control.label) input.setAttribute("aria-label", title);
    card.querySelector(".cq-controls").append(label);
    input.addEventListener("input", () => { at[i] = Number(input.value); show(i); });
    return { input, shown };
  });
  const show = (moved) => {
    if (!frames[at.join()]) controls.forEach((control, i) => { if (i !== moved) at[i] = control.start; });
    const [line, picture] = frames[at.join()];
    inputs.forEach(({ input, shown }, i) => {
      input.value = at[i];
      shown.textContent = controls[i].places[at[i]];
      if (controls[i].slider) input.setAttribute("aria-valuetext", controls[i].places[at[i]]);
    });
    const image = card.querySelector(".cq-picture");
    card.querySelector(".cq-line").innerHTML = line;
    image.hidden = picture === null;
    if (picture !== null) image.src = "data:image/png;base64," + picture;
    image.alt = card.querySelector(".cq-line").textContent;
  };
  show(-1);
}

// What the theme leaves out for those who use no mouse or do not see the page.
function reachable() {
  document.querySelectorAll("[role=heading]:not([aria-level])").forEach((it) => it.setAttribute("aria-level", "2"));
  document.querySelectorAll("pre, .cell_output, .cq-formula, .table-wrapper").forEach((it) => {
    if (it.scrollWidth > it.clientWidth || it.scrollHeight > it.clientHeight) it.tabIndex = 0;
  });
}

document.addEventListener("DOMContentLoaded", () => {
  reachable();
  document.querySelectorAll(".cq-quiz").forEach(quiz);
  document.querySelectorAll(".cq-guess").forEach(guess);
  document.querySelectorAll(".cq-explore").forEach(explore);
});
