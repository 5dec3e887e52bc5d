// Joined in front of every view's own module (see base.py), so each view stays one file without imports.
// All text goes in through textContent; nothing here builds markup from strings.

const TABLE = Uint8Array.from(atob(PALETTE), c => c.charCodeAt(0));

function node(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

function isDark() {
  const lab = document.body.dataset.jpThemeLight;
  return lab === undefined ? matchMedia('(prefers-color-scheme: dark)').matches : lab === 'false';
}

// Small values recede into the page and large ones stand out, in either theme.
function shade(share, dark) {
  const entry = Math.round(clamp(share, 0, 1) * 255), at = 3 * (dark ? entry : 255 - entry);
  return [TABLE[at], TABLE[at + 1], TABLE[at + 2]];
}

const css = colour => `rgb(${colour.join(',')})`;

// Black or white, whichever is the more readable (relative luminance as in WCAG).
function ink(colour) {
  const [r, g, b] = colour.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? '#000' : '#fff';
}

function floats(view) {
  if (!view || !view.byteLength) return new Float32Array(0);
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

function number(x) {
  if (x === null || x === undefined || !Number.isFinite(x)) return 'not measured';
  if (x === 0) return '0';
  return Math.abs(x) < 0.001 ? x.toExponential(1) : Math.abs(x) < 1000 ? x.toPrecision(3) : x.toFixed(0);
}

const percent = p => p >= 0.9995 ? '100 %' : p >= 0.0995 ? `${(100 * p).toFixed(1)} %`
  : p >= 0.0001 ? `${(100 * p).toFixed(2)} %` : p === 0 ? '0 %' : '< 0.01 %';

// A token as [kind, text] pieces: stand-ins for invisible characters are set apart from ordinary text.
function putPieces(parent, pieces) {
  parent.replaceChildren(...pieces.map(([kind, text]) => node('span', kind === 'mark' ? 'gptoss-mark' : '', text)));
}

const piecesText = pieces => pieces.map(piece => piece[1]).join('');

// The frame that all views share: a title, a legend at its right, the body, one line of detail below.
function panel(el, model, className) {
  const root = node('section', `gptoss-view ${className}`);
  const head = node('div', 'gptoss-head'), title = node('h3', 'gptoss-title'), legend = node('div', 'gptoss-legend');
  const body = node('div', 'gptoss-body'), empty = node('p', 'gptoss-empty'), detail = node('p', 'gptoss-detail');
  title.id = `gptoss-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;
  root.setAttribute('aria-labelledby', title.id);
  detail.setAttribute('role', 'status');
  head.append(title, legend);
  root.append(head, body, empty, detail);
  el.append(root);
  const dress = () => {
    title.textContent = model.get('title');
    empty.textContent = model.get('empty');
    empty.hidden = !model.get('empty');
    body.hidden = !!model.get('empty');
    root.classList.toggle('gptoss-stale', !!model.get('stale'));
  };
  return { root, head, title, legend, body, detail, dress };
}

// Calls paint at most once a frame, after a new seq, a theme change or a resize, and then marks data-seq.
function keepPainted(model, parts, paint) {
  let asked = false, dead = false, waits = 0;
  const now = () => {
    asked = false;
    if (dead) return;
    if (!parts.root.clientWidth && waits < 50) {   // hidden, e.g. while a theme is being changed: no size to draw in
      waits += 1;
      setTimeout(ask, 100);
      return;
    }
    waits = 0;
    parts.dress();
    paint();
    parts.root.dataset.seq = model.get('seq');
  };
  const ask = () => { if (!asked && !dead) { asked = true; requestAnimationFrame(now); } };
  const scheme = matchMedia('(prefers-color-scheme: dark)');
  const theme = new MutationObserver(ask);
  theme.observe(document.body, { attributes: true, attributeFilter: ['data-jp-theme-light', 'data-jp-theme-name'] });
  let width = -1;
  const size = new ResizeObserver(([entry]) => {
    const next = Math.round(entry.contentRect.width);
    if (next !== width) { width = next; ask(); }
  });
  size.observe(parts.root);
  model.on('change:seq', ask);
  scheme.addEventListener('change', ask);
  ask();
  return {
    ask,
    stop() {
      dead = true;
      model.off('change:seq', ask);
      scheme.removeEventListener('change', ask);
      theme.disconnect();
      size.disconnect();
    },
  };
}

function showLegend(holder, low, high, unit, dark) {
  const bar = node('span', 'gptoss-ramp');
  const stops = Array.from({ length: 9 }, (_, i) => css(shade(i / 8, dark)));
  bar.style.background = `linear-gradient(to right, ${stops.join(',')})`;
  holder.replaceChildren(node('span', '', number(low)), bar, node('span', '', `${number(high)} ${unit}`));
}

// Scrolls inside the box only; scrollIntoView would also move the notebook.
function keepVisible(box, child, margin = 4) {
  const outer = box.getBoundingClientRect(), inner = child.getBoundingClientRect();
  if (inner.top < outer.top + margin) box.scrollTop -= outer.top + margin - inner.top;
  else if (inner.bottom > outer.bottom - margin) box.scrollTop += inner.bottom - outer.bottom + margin;
}
