// A signed heatmap of tokens (down) by layers (across), such as the result of a patch experiment.

const SIGNED = Object.fromEntries(Object.entries(SIGNED_TABLES).map(
  ([theme, text]) => [theme, Uint8Array.from(atob(text), c => c.charCodeAt(0))]));

function signedShade(share, dark) {   // share -1 .. 1
  const table = SIGNED[dark ? 'dark' : 'light'], middle = (table.length / 3 - 1) / 2;
  const at = 3 * Math.round(middle * (1 + clamp(share, -1, 1)));
  return [table[at], table[at + 1], table[at + 2]];
}

export default { render({ model, el }) {
  const parts = panel(el, model, 'gptoss-heat');
  const scroll = node('div', 'gptoss-heat-scroll'), frame = node('div', 'gptoss-heat-frame');
  const tokensAxis = node('div', 'gptoss-token-axis'), place = node('div', 'gptoss-cells'), canvas = node('canvas');
  const layersAxis = node('div', 'gptoss-expert-axis');
  canvas.setAttribute('aria-hidden', 'true');
  tokensAxis.setAttribute('aria-hidden', 'true');
  layersAxis.setAttribute('aria-hidden', 'true');
  place.tabIndex = 0;
  place.setAttribute('role', 'application');
  place.setAttribute('aria-roledescription', 'heatmap');
  place.append(canvas);
  frame.append(tokensAxis, place, layersAxis);
  scroll.append(frame);
  parts.body.append(scroll);

  let values = new Float32Array(0), labels = [], layers = [], cellWidth = 0, rowHeight = 22, hovered = null, cursor = [0, 0];
  const value = ([token, layer]) => values[layer * labels.length + token];
  const name = label => piecesText(label.pieces) + (label.other ? ` | ${piecesText(label.other)}` : '');

  const tell = () => {
    const at = hovered || (place === document.activeElement ? cursor : null);
    parts.detail.textContent = at && at[0] < labels.length && at[1] < layers.length
      ? `layer ${layers[at[1]]}, token ${at[0]} “${name(labels[at[0]])}”: ${number(value(at))} ${model.get('unit')}`
      : model.get('hint');
  };

  const draw = () => {
    const dark = isDark(), ratio = window.devicePixelRatio || 1, high = model.get('high') || 1;
    const wide = layers.length * cellWidth, tall = labels.length * rowHeight, line = getComputedStyle(parts.root).color;
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round(tall * ratio);
    canvas.style.width = place.style.width = `${wide}px`;
    canvas.style.height = place.style.height = `${tall}px`;
    const pen = canvas.getContext('2d');
    pen.scale(ratio, ratio);
    pen.font = `11px ${getComputedStyle(parts.root).fontFamily}`;
    pen.textAlign = 'center';
    pen.textBaseline = 'middle';
    for (let token = 0; token < labels.length; token++) {
      for (let layer = 0; layer < layers.length; layer++) {
        const x = layer * cellWidth, y = token * rowHeight, here = value([token, layer]);
        if (!Number.isFinite(here)) {   // not measured: an empty outline, not a colour
          pen.strokeStyle = line; pen.globalAlpha = 0.25;
          pen.strokeRect(x + 0.5, y + 0.5, cellWidth - 2, rowHeight - 2);
          pen.globalAlpha = 1;
          continue;
        }
        const colour = signedShade(here / high, dark);
        pen.fillStyle = css(colour);
        pen.fillRect(x, y, cellWidth - 1, rowHeight - 1);
        if (cellWidth >= 36) { pen.fillStyle = ink(colour); pen.fillText((Math.abs(here) < 0.005 ? 0 : here).toFixed(2), x + cellWidth / 2, y + rowHeight / 2); }
      }
    }
    if (place === document.activeElement && cursor[0] < labels.length && cursor[1] < layers.length) {
      for (const [colour, width] of [['#fff', 3], ['#000', 1]]) {
        pen.strokeStyle = colour; pen.lineWidth = width;
        pen.strokeRect(cursor[1] * cellWidth + 1, cursor[0] * rowHeight + 1, cellWidth - 3, rowHeight - 3);
      }
    }
  };

  const axis = () => {
    tokensAxis.replaceChildren(...labels.map(label => {
      const row = node('div', 'gptoss-guess'), text = node('span');
      row.style.height = row.style.lineHeight = `${rowHeight}px`;
      row.title = name(label);
      putPieces(text, label.pieces);
      row.append(text);
      if (label.other) {
        const other = node('span', 'gptoss-other');
        putPieces(other, label.other);
        row.append(other);
      }
      return row;
    }));
    const step = [1, 2, 4, 8].find(s => s * cellWidth >= 20) || 16;
    layersAxis.replaceChildren(...layers.flatMap((layer, i) => {
      if (i % step) return [];
      const label = node('span', '', String(layer));
      label.style.left = `${(i + 0.5) * cellWidth}px`;
      return [label];
    }), node('span', 'gptoss-axis-name', 'layer'));
    layersAxis.lastChild.style.left = `${layers.length * cellWidth / 2}px`;
  };

  const paint = () => {
    values = floats(model.get('values'));
    labels = model.get('labels');
    layers = model.get('layers');
    const longest = Math.max(4, ...labels.map(label => name(label).length));
    tokensAxis.style.width = `${Math.min(longest * 7 + 22, 200)}px`;
    const room = parts.body.clientWidth - Math.min(longest * 7 + 22, 200) - 26;
    cellWidth = layers.length ? Math.floor(clamp(room / layers.length, 6, 64)) : 0;
    place.setAttribute('aria-label', `${model.get('title')} ${labels.length} tokens by ${layers.length} layers. Arrow keys move.`);
    axis();
    draw();
    const dark = isDark(), high = model.get('high') || 1, bar = node('span', 'gptoss-ramp');
    bar.style.background = `linear-gradient(to right, ${Array.from({ length: 9 }, (_, i) => css(signedShade(i / 4 - 1, dark))).join(',')})`;
    parts.legend.replaceChildren(node('span', '', number(-high)), bar, node('span', '', `${number(high)} ${model.get('unit')}`));
    tell();
  };

  const cellAt = event => {
    const box = canvas.getBoundingClientRect();
    const token = Math.floor((event.clientY - box.top) / rowHeight), layer = Math.floor((event.clientX - box.left) / cellWidth);
    return token >= 0 && token < labels.length && layer >= 0 && layer < layers.length ? [token, layer] : null;
  };
  place.addEventListener('mousemove', event => { hovered = cellAt(event); tell(); });
  place.addEventListener('mouseleave', () => { hovered = null; tell(); });
  place.addEventListener('click', event => { cursor = cellAt(event) || cursor; draw(); tell(); });
  for (const happening of ['focus', 'blur']) place.addEventListener(happening, () => { draw(); tell(); });
  place.addEventListener('keydown', event => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    hovered = null;
    cursor = [clamp(cursor[0] + step[0], 0, labels.length - 1), clamp(cursor[1] + step[1], 0, layers.length - 1)];
    draw();
    tell();
  });

  const painting = keepPainted(model, parts, paint);
  return () => painting.stop();
} };
