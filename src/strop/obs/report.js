"use strict";
// The page's data lies in #data. Times are unix seconds; pieces map them to the axis, in which the waiting
// between attempts is shortened: [[from, to, x from, x to, waiting], ...].
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const NS = "http://www.w3.org/2000/svg";

function make(parent, name, attributes, text) {
  const element = document.createElementNS(NS, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  parent.appendChild(element);
  return element;
}
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18) + "px";
}
function hideTip() { tip.hidden = true; }

function clock(t, withDate) {
  const iso = new Date(t * 1000).toISOString();
  return (withDate ? iso.slice(5, 10) + " " : "") + iso.slice(11, 19);
}
function seconds(s) {
  if (s < 60) return s.toFixed(1) + " s";
  const m = Math.floor(s / 60), h = Math.floor(m / 60);
  return h ? h + "h" + String(m % 60).padStart(2, "0") + "m" : m + "m" + String(Math.floor(s % 60)).padStart(2, "0") + "s";
}

// ------------------------------------------------------------------------------------------ timeline

function timeline(root, d) {
  const LEFT = 176, RIGHT = 14, TOP = 46, BOTTOM = 26, GAP = 5;
  const SOFT = ["start", "preflight", "data", "rendezvous", "unknown"];
  const END = { first: "failed first", failed: "failed too", followed: "only followed", silent: "left no word", done: "ended in order", "": "still runs" };
  const total = d.pieces.length ? d.pieces[d.pieces.length - 1][3] : 1;
  let low = 0, high = total;

  const toX = t => {
    for (const [a, b, x, y] of d.pieces) if (t <= b) return b > a ? x + (Math.max(t, a) - a) / (b - a) * (y - x) : x;
    return total;
  };
  const heights = d.bands.map(b => Math.round(16 + 5 * Math.log2(b.count)));
  const height = TOP + heights.reduce((s, h) => s + h + GAP, 0) + BOTTOM;

  function draw() {
    const width = Math.max(480, root.clientWidth);
    root.replaceChildren();
    const svg = make(root, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "phases of the ranks over time" });
    const defs = make(svg, "defs", {}), clip = make(defs, "clipPath", { id: "plot" });
    const hatch = make(defs, "pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
    make(hatch, "rect", { width: 6, height: 6, fill: "var(--bad-soft)" });
    make(hatch, "rect", { width: 1.6, height: 6, fill: "var(--bad)", opacity: 0.45 });
    make(clip, "rect", { x: LEFT, y: 0, width: width - LEFT - RIGHT, height });
    const scale = (width - LEFT - RIGHT) / (high - low);
    const at = t => LEFT + (toX(t) - low) * scale;
    const plot = make(svg, "g", { "clip-path": "url(#plot)" });
    const ends = heights.reduce((s, h) => s + h + GAP, TOP);
    for (const [a, b, , , waiting] of d.pieces) {
      if (!waiting) continue;
      const x = at(a), w = at(b) - x;
      hover(make(plot, "rect", { x, y: TOP - 4, width: Math.max(w, 1), height: ends - TOP + 4, fill: "var(--hair)" }), `not running for ${seconds(b - a)}\n${clock(a, true)} to ${clock(b, true)} UTC`);
      if (w > 46) make(plot, "text", { x: x + w / 2, y: (TOP + ends) / 2, "text-anchor": "middle" }, seconds(b - a));
    }
    for (const a of d.attempts) {
      const x = Math.max(at(a.began), LEFT), y = Math.min(at(a.ended), width - RIGHT);
      if (y <= LEFT || x >= width - RIGHT) continue;
      make(plot, "rect", { x, y: 24, width: Math.max(y - x, 2), height: 4, rx: 2, fill: a.bad ? "var(--bad)" : a.ok ? "var(--good)" : "var(--faint)" });
      const words = `attempt ${a.attempt}` + (a.cause ? `: ${a.cause}` : "");
      const room = Math.floor((y - x) / 6.6);
      if (room > 2) make(plot, "text", { x: x + 1, y: 17 }, words.length <= room ? words : room > 10 ? words.slice(0, room - 1) + "\u2026" : `${a.attempt}`);
    }
    let top = TOP;
    d.bands.forEach((band, i) => { row(svg, plot, band, top, heights[i], at, width); top += heights[i] + GAP; });
    axis(svg, plot, at, ends, width);
    interact(svg, width);
  }

  function row(svg, plot, band, y, h, at, width) {
    const count = band.count === 1 ? "1 rank" : `${band.count} ranks`;
    const label = make(svg, "text", { x: 0, y: y + h / 2 + 4, class: band.culprit ? "name culprit" : "name" });
    label.textContent = (band.count === 1 ? "rank " : "") + (band.ranks.length > 20 ? band.ranks.slice(0, 19) + "\u2026" : band.ranks);
    if (band.count > 1 && h >= 16) make(label, "tspan", { dx: 6, fill: "var(--faint)", "font-weight": 400 }, `${band.count}`);
    hover(label, `${count}: ${band.ranks}\n${band.nodes}`);
    for (const life of band.lives) {
      for (const [phase, a, b, first, last] of life.spans) {
        const x = at(a), w = at(b) - x;
        if (x > width || x + w < LEFT) continue;
        const step = first === null && last === null ? "" : first === last ? `, step ${first ?? last}` : `, steps ${first ?? 0} to ${last}`;
        hover(make(plot, "rect", { x, y, width: Math.max(w, 0.7), height: h, fill: phase === "no sign" ? "url(#hatch)" : `var(--${d.phases.includes(phase) ? phase : "unknown"})` }),
          `${phase}${step}: ${seconds(b - a)}\n${clock(a, true)} to ${clock(b)} UTC\nattempt ${life.attempt}, ${count}: ${band.ranks}\n${END[life.end]}`);
        if (w > 64 && h >= 16 && phase !== "no sign") make(plot, "text", { x: Math.max(x, LEFT) + 6, y: y + h / 2 + 4, style: `fill:var(${SOFT.includes(phase) ? "--on-soft" : "--on-phase"});pointer-events:none` }, phase);
      }
      const known = life.spans.filter(s => s[0] !== "no sign");
      const end = known.length ? known[known.length - 1][2] : null;
      if (end === null || life.end === "done" || life.end === "") continue;
      const x = at(end), bad = life.end === "first";
      const mark = bad ? make(plot, "path", { d: `M${x - 6} ${y + h / 2 - 6}l12 12m0 -12l-12 12`, stroke: "var(--bad)", "stroke-width": 3, "stroke-linecap": "round" })
        : make(plot, "rect", { x: x - 1.5, y, width: 3, height: h, fill: life.end === "followed" ? "var(--faint)" : "var(--bad)", opacity: 0.85 });
      hover(mark, `${END[life.end]} at ${clock(end, true)} UTC\nattempt ${life.attempt}, ${count}: ${band.ranks}`);
    }
  }

  function axis(svg, plot, at, y, width) {
    const steps = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400, 172800, 604800];
    const running = (high - low) / total * d.pieces.reduce((s, p) => s + (p[4] ? 0 : p[1] - p[0]), 0);
    const step = steps.find(s => s > running / ((width - LEFT) / 120)) || 2419200;
    let last = -Infinity;
    for (const [a, b, , , waiting] of d.pieces) {
      if (waiting) continue;
      for (let t = Math.ceil(a / step) * step; t <= b; t += step) {
        const x = at(t);
        if (x < LEFT || x > width - RIGHT || x - last < 62) continue;
        last = x;
        make(plot, "line", { x1: x, x2: x, y1: y - 2, y2: y + 3, stroke: "var(--faint)" });
        make(svg, "text", { x, y: y + 17, "text-anchor": x < LEFT + 40 ? "start" : x > width - 50 ? "end" : "middle" }, step < 86400 ? clock(t).slice(0, step < 60 ? 8 : 5) : clock(t, true).slice(0, 5));
      }
    }
    make(svg, "text", { x: 0, y: y + 17 }, "UTC, rank 0\u2019s clock");
  }

  function hover(element, text) {
    element.addEventListener("mousemove", event => showTip(event, text));
    element.addEventListener("mouseleave", hideTip);
  }
  function zoom(a, b) {
    const span = Math.min(Math.max(b - a, total / 5000), total);
    low = Math.min(Math.max(a, 0), total - span);
    high = low + span;
    draw();
  }
  function interact(svg, width) {
    const where = event => low + (event.clientX - svg.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT) * (high - low);
    svg.addEventListener("wheel", event => {
      if (!event.ctrlKey && !event.shiftKey) return;  // the page scrolls
      event.preventDefault();
      const x = where(event), factor = (event.deltaY || event.deltaX) > 0 ? 1.25 : 0.8;
      hideTip();
      zoom(x - (x - low) * factor, x + (high - x) * factor);
    }, { passive: false });
    svg.addEventListener("dblclick", () => zoom(0, total));
    svg.addEventListener("mousedown", down => {
      const from = down.clientX, a = low, b = high, scale = (b - a) / (width - LEFT - RIGHT);
      const move = event => { hideTip(); zoom(a - (event.clientX - from) * scale, b - (event.clientX - from) * scale); };
      const up = () => { removeEventListener("mousemove", move); removeEventListener("mouseup", up); };
      addEventListener("mousemove", move);
      addEventListener("mouseup", up);
    });
  }
  for (const button of document.querySelectorAll("button[data-attempt]")) {
    button.addEventListener("click", () => {
      const a = d.attempts.find(x => String(x.attempt) === button.dataset.attempt);
      if (!a) return zoom(0, total);
      const from = toX(a.began), to = toX(a.ended), room = (to - from) * 0.02;
      zoom(from - room, to + room);
    });
  }
  addEventListener("resize", draw);
  draw();
}

// -------------------------------------------------------------------------------------------- curves

function curve(box) {
  const svg = box.querySelector("svg"), d = data.curves[box.dataset.curve];
  const cross = make(svg, "line", { class: "cross", y1: d.top, y2: d.bottom, visibility: "hidden" });
  const steps = d.train.length ? d.train : d.eval;
  svg.addEventListener("mousemove", event => {
    const frame = svg.getBoundingClientRect();
    const step = d.low + ((event.clientX - frame.left) / frame.width * d.width - d.left) / (d.right - d.left) * (d.high - d.low);
    const near = points => points.length ? points.reduce((best, p) => Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best) : null;
    const here = near(steps), other = near(d.eval);
    const x = d.left + (here[0] - d.low) / (d.high - d.low || 1) * (d.right - d.left);
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
    cross.setAttribute("visibility", "visible");
    let text = `step ${here[0]}: ${number(here[1])}`;
    if (other && d.train.length) text += `\nvalidation at step ${other[0]}: ${number(other[1])}`;
    showTip(event, text);
  });
  svg.addEventListener("mouseleave", () => { cross.setAttribute("visibility", "hidden"); hideTip(); });
}
function number(v) {
  const size = Math.abs(v);
  return v === 0 ? "0" : size >= 1e5 || size < 1e-3 ? v.toExponential(3) : String(Number(v.toPrecision(5)));
}

timeline(document.getElementById("timeline"), data.timeline);
document.querySelectorAll(".chart").forEach(curve);
