// The token strip: every token of the text, grouped by message, coloured by one quantity.

const bytesOf = hex => Uint8Array.from(hex ? hex.split(' ') : [], h => parseInt(h, 16));

export default { render({ model, el }) {
  const parts = panel(el, model, 'gptoss-strip');
  const list = node('div', 'gptoss-tokens');
  const prefix = parts.title.id;
  list.tabIndex = 0;
  list.setAttribute('role', 'listbox');
  list.setAttribute('aria-orientation', 'horizontal');
  list.setAttribute('aria-labelledby', parts.title.id);
  parts.body.append(list);

  let tokens = [], groups = [], values = new Float32Array(0), nodes = [], layout = '', hovered = -1, shown = -1;

  const describe = i => {
    if (i < 0 || i >= tokens.length) return '\u00a0';
    const token = tokens[i], group = groups.find(g => i >= g.start && i < g.stop);
    const where = group ? `${group.label}, ${token.field}` : token.field;
    const bytes = token.hex && token.hex.length > 59 ? `${token.hex.slice(0, 59)} …` : token.hex;
    return `token ${i}  “${piecesText(token.pieces)}”  ·  id ${token.id < 0 ? 'shared' : token.id}`
      + (bytes ? `  ·  bytes ${bytes}` : '') + (token.known ? '' : '  ·  unknown to this model') + `  ·  ${where}  ·  ${model.get('quantity')} ${number(values[i])}`
      + (Number.isFinite(values[i]) ? ` ${model.get('unit')}` : '');
  };
  const tell = () => { parts.detail.textContent = describe(hovered >= 0 ? hovered : model.get('selected')); };

  const mark = () => {
    const selected = model.get('selected');
    if (shown >= 0 && nodes[shown]) nodes[shown].setAttribute('aria-selected', 'false');
    if (nodes[selected] && selected < tokens.length) {
      nodes[selected].setAttribute('aria-selected', 'true');
      list.setAttribute('aria-activedescendant', nodes[selected].id);
    } else list.removeAttribute('aria-activedescendant');
    if (selected !== shown && nodes[selected]) keepVisible(list, nodes[selected]);
    shown = selected;
    tell();
  };

  const choose = i => {
    i = clamp(i, 0, tokens.length - 1);
    if (!tokens.length || i === model.get('selected')) return;
    model.set('selected', i);
    model.save_changes();
    mark();
  };

  const makeToken = i => {
    const made = node('span', 'gptoss-token');
    made.id = `${prefix}-${i}`;
    made.setAttribute('role', 'option');
    made.setAttribute('aria-selected', 'false');
    made.dataset.index = i;
    return made;
  };

  const arrange = () => {   // rows of one message each; a token that ends a line is followed by a break
    const rows = groups.map(group => {
      const row = node('div', `gptoss-message gptoss-${group.kind}`), label = node('span', 'gptoss-label', group.label);
      row.setAttribute('role', 'group');
      row.setAttribute('aria-label', group.label);
      label.setAttribute('aria-hidden', 'true');
      const holder = node('span', 'gptoss-run');
      holder.setAttribute('role', 'presentation');
      for (let i = group.start; i < group.stop; i++) {
        holder.append(nodes[i]);
        if (tokens[i].breaks && i + 1 < group.stop) {
          const end = node('span', 'gptoss-break');
          end.setAttribute('aria-hidden', 'true');
          holder.append(end);
        }
      }
      row.append(label, holder);
      return row;
    });
    list.replaceChildren(...rows);
  };

  const paint = () => {
    tokens = model.get('tokens');
    groups = model.get('groups');
    values = floats(model.get('values'));
    const low = model.get('low'), high = model.get('high'), dark = isDark();
    while (nodes.length < tokens.length) nodes.push(makeToken(nodes.length));
    nodes.length = tokens.length;
    tokens.forEach((token, i) => {
      const place = nodes[i], key = JSON.stringify([token.pieces, token.field, token.special, token.known]);
      if (place.dataset.key !== key) {
        place.dataset.key = key;
        putPieces(place, token.pieces);
        place.setAttribute('aria-label', `${i}: ${piecesText(token.pieces)}${token.known ? '' : ', unknown to this model'}`);
        place.className = `gptoss-token gptoss-${token.field}${token.special ? ' gptoss-special' : ''}${token.known ? '' : ' gptoss-unknown'}`;
      }
      const measured = Number.isFinite(values[i]);
      place.classList.toggle('gptoss-unmeasured', !measured);
      const colour = measured ? shade((values[i] - low) / (high - low || 1), dark) : null;
      place.style.backgroundColor = colour ? css(colour) : '';
      place.style.color = colour ? ink(colour) : '';
    });
    const next = JSON.stringify([groups, tokens.map(t => t.breaks ? 1 : 0)]);
    const atEnd = list.scrollTop + list.clientHeight >= list.scrollHeight - 8;
    if (next !== layout) { layout = next; arrange(); }
    if (atEnd && model.get('selected') === tokens.length - 1) list.scrollTop = list.scrollHeight;
    showLegend(parts.legend, low, high, model.get('unit'), dark);
    parts.legend.prepend(node('span', 'gptoss-about', `${model.get('quantity')}: ${model.get('about')}`));
    mark();
  };

  const indexOf = event => {
    const target = event.target.closest?.('.gptoss-token');
    return target && list.contains(target) ? Number(target.dataset.index) : -1;
  };
  list.addEventListener('click', event => { if (indexOf(event) >= 0) choose(indexOf(event)); });
  list.addEventListener('mouseover', event => { hovered = indexOf(event); tell(); });
  list.addEventListener('mouseleave', () => { hovered = -1; tell(); });

  const vertical = direction => {   // the nearest token on the next line up or down
    const from = nodes[model.get('selected')]?.getBoundingClientRect();
    if (!from) return -1;
    const x = from.left + from.width / 2;
    let line = null, best = -1, gap = Infinity;
    const order = [...nodes.keys()].filter(i => direction > 0 ? i > model.get('selected') : i < model.get('selected'));
    if (direction < 0) order.reverse();
    for (const i of order) {
      const box = nodes[i].getBoundingClientRect();
      if (Math.abs(box.top - from.top) < from.height / 2) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) > from.height / 2) break;
      const away = Math.abs(box.left + box.width / 2 - x);
      if (away < gap) { gap = away; best = i; }
    }
    return best;
  };
  list.addEventListener('keydown', event => {
    const now = model.get('selected');
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: tokens.length - 1 }[event.key]
      ?? (event.key === 'ArrowUp' ? vertical(-1) : event.key === 'ArrowDown' ? vertical(1) : undefined);
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (to >= 0) choose(to);
  });
  list.addEventListener('copy', event => {   // the exact bytes, not the stand-ins
    const selection = getSelection();
    const range = selection.rangeCount && !selection.isCollapsed ? selection.getRangeAt(0) : null;
    const picked = range ? [...nodes.keys()].filter(i => range.intersectsNode(nodes[i])) : [model.get('selected')];
    const bytes = picked.flatMap(i => tokens[i] ? [...bytesOf(tokens[i].hex)] : []);
    event.clipboardData.setData('text/plain', new TextDecoder().decode(Uint8Array.from(bytes)));
    event.preventDefault();
    event.stopPropagation();
  });

  // Spoken while somebody moves in the strip; silent while it only follows what is typed.
  const speak = () => parts.detail.setAttribute('aria-live', list === document.activeElement ? 'polite' : 'off');
  list.addEventListener('focus', speak);
  list.addEventListener('blur', speak);
  speak();

  const painting = keepPainted(model, parts, paint);
  model.on('change:selected', mark);
  return () => { painting.stop(); model.off('change:selected', mark); };
} };
