// The expert grid: layers down, experts across. A click (or Enter) bans an expert or lets it back in.

export default { render({ model, el }) {
  const parts = panel(el, model, 'gptoss-grid');
  const frame = node('div', 'gptoss-grid-frame'), layersAxis = node('div', 'gptoss-layer-axis');
  const place = node('div', 'gptoss-cells'), canvas = node('canvas'), expertsAxis = node('div', 'gptoss-expert-axis');
  canvas.setAttribute('aria-hidden', 'true');
  place.tabIndex = 0;
  place.setAttribute('role', 'application');
  place.setAttribute('aria-roledescription', 'expert grid');
  place.append(canvas);
  frame.append(layersAxis, place, expertsAxis);
  parts.body.append(frame);
  layersAxis.setAttribute('aria-hidden', 'true');
  expertsAxis.setAttribute('aria-hidden', 'true');

  let weights = new Float32Array(0), layers = 0, experts = 0, cellWidth = 0, rowHeight = 0, hovered = null, cursor = [0, 0];

  const isBanned = (layer, expert) => model.get('banned').some(([l, e]) => l === layer && e === expert);
  const isChosen = (layer, expert) => (model.get('chosen')[layer] || []).includes(expert);

  const describe = ([layer, expert]) => {
    const band = model.get('bands')[layer];
    return `layer ${layer}${band ? ` (${band})` : ''}, expert ${expert}: `
      + `${model.get('measure')} ${number(weights[layer * experts + expert])}`
      + (isBanned(layer, expert) ? ', banned' : isChosen(layer, expert) ? ', chosen' : '');
  };
  const tell = () => {
    const at = hovered || (place === document.activeElement ? cursor : null);
    parts.detail.textContent = at && at[0] < layers && at[1] < experts ? describe(at) : model.get('hint');
  };

  const axis = () => {
    const sparse = rowHeight < 13 ? 4 : 1;
    layersAxis.replaceChildren(...Array.from({ length: layers }, (_, layer) => {
      const label = node('span', 'gptoss-layer', layer % sparse ? '' : String(layer)), band = model.get('bands')[layer];
      if (band) { label.title = `layer ${layer}: ${band} attention`; label.dataset.band = band; }
      label.style.height = `${rowHeight}px`;
      return label;
    }));
    const step = [1, 2, 4, 8, 16, 32].find(s => s * cellWidth >= 22) || 64;
    expertsAxis.replaceChildren(...Array.from({ length: Math.ceil(experts / step) }, (_, i) => {
      const label = node('span', '', String(i * step));
      label.style.left = `${(i * step + 0.5) * cellWidth}px`;
      return label;
    }));
  };

  const draw = () => {
    const dark = isDark(), ratio = window.devicePixelRatio || 1, high = model.get('high') || 1;
    const wide = experts * cellWidth, tall = layers * rowHeight;
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round(tall * ratio);
    canvas.style.width = place.style.width = `${wide}px`;
    canvas.style.height = place.style.height = `${tall}px`;
    const pen = canvas.getContext('2d');
    pen.scale(ratio, ratio);
    pen.clearRect(0, 0, wide, tall);
    const gap = cellWidth >= 6 ? 1 : 0, light = getComputedStyle(parts.root).color;
    const banned = new Set(model.get('banned').map(([l, e]) => l * experts + e));
    for (let layer = 0; layer < layers; layer++) {
      for (let expert = 0; expert < experts; expert++) {
        const value = weights[layer * experts + expert], x = expert * cellWidth, y = layer * rowHeight;
        const measured = Number.isFinite(value), colour = shade(measured ? value / high : 0, dark);
        const w = cellWidth - gap, h = rowHeight - 1;
        if (measured) { pen.fillStyle = css(colour); pen.fillRect(x, y, w, h); }
        else { pen.strokeStyle = light; pen.globalAlpha = 0.25; pen.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1); pen.globalAlpha = 1; }
        if (isChosen(layer, expert)) {
          pen.strokeStyle = light; pen.lineWidth = cellWidth >= 10 ? 2 : 1;
          const inset = pen.lineWidth / 2;
          pen.strokeRect(x + inset, y + inset, w - 2 * inset, h - 2 * inset);
        }
        if (banned.has(layer * experts + expert)) {
          pen.strokeStyle = measured ? ink(colour) : light; pen.lineWidth = cellWidth >= 10 ? 2 : 1.2;
          const pad = cellWidth >= 10 ? 3 : 0.5;
          pen.beginPath();
          pen.moveTo(x + pad, y + pad); pen.lineTo(x + w - pad, y + h - pad);
          pen.moveTo(x + w - pad, y + pad); pen.lineTo(x + pad, y + h - pad);
          pen.stroke();
        }
      }
    }
    if (place === document.activeElement && cursor[0] < layers && cursor[1] < experts) {
      const x = cursor[1] * cellWidth, y = cursor[0] * rowHeight;
      for (const [colour, inset, line] of [['#fff', 0.5, 3], ['#000', 0.5, 1]]) {
        pen.strokeStyle = colour; pen.lineWidth = line;
        pen.strokeRect(x + inset, y + inset, cellWidth - 2 * inset, rowHeight - 2 * inset);
      }
    }
  };

  const paint = () => {
    weights = floats(model.get('weights'));
    layers = model.get('layers');
    experts = model.get('experts');
    rowHeight = model.get('row_height');
    const room = parts.body.clientWidth - 34;
    cellWidth = experts ? clamp(room / experts, 3, 40) : 0;
    if (cellWidth > 6) cellWidth = Math.floor(cellWidth);
    place.setAttribute('aria-label', `${model.get('title')} ${layers} layers by ${experts} experts. `
      + 'Arrow keys move, Enter bans an expert or lets it back in.');
    axis();
    draw();
    showLegend(parts.legend, 0, model.get('high'), model.get('measure'), isDark());
    tell();
  };

  const toggle = ([layer, expert]) => {
    const rest = model.get('banned').filter(([l, e]) => l !== layer || e !== expert);
    model.set('banned', isBanned(layer, expert) ? rest : [...rest, [layer, expert]]);
    model.save_changes();
    draw();
    tell();
  };
  const cellAt = event => {
    const box = canvas.getBoundingClientRect();
    const layer = Math.floor((event.clientY - box.top) / rowHeight), expert = Math.floor((event.clientX - box.left) / cellWidth);
    return layer >= 0 && layer < layers && expert >= 0 && expert < experts ? [layer, expert] : null;
  };
  place.addEventListener('mousemove', event => { hovered = cellAt(event); tell(); });
  place.addEventListener('mouseleave', () => { hovered = null; tell(); });
  place.addEventListener('click', event => { const at = cellAt(event); if (at) { cursor = at; toggle(at); } });
  place.addEventListener('focus', () => { draw(); tell(); });
  place.addEventListener('blur', () => { draw(); tell(); });
  place.addEventListener('keydown', event => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step && event.key !== 'Enter' && event.key !== ' ') return;
    event.preventDefault();
    event.stopPropagation();
    hovered = null;
    if (step) cursor = [clamp(cursor[0] + step[0], 0, layers - 1), clamp(cursor[1] + step[1], 0, experts - 1)];
    else toggle(cursor);
    draw();
    tell();
  });

  const painting = keepPainted(model, parts, paint);
  model.on('change:banned', painting.ask);
  return () => { painting.stop(); model.off('change:banned', painting.ask); };
} };
