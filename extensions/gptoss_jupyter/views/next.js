// The next-token distribution as bars; with edits active, the unedited probability stands beside each.

export default { render({ model, el }) {
  const parts = panel(el, model, 'gptoss-next');
  const table = node('table', 'gptoss-next-table');
  table.setAttribute('aria-labelledby', parts.title.id);
  parts.body.append(table);

  const bar = (className, prob) => {
    const made = node('span', `gptoss-bar ${className}`);
    made.style.width = `${Math.max(0.5, 100 * clamp(prob, 0, 1))}%`;
    return made;
  };

  const share = prob => prob === null ? `< ${percent(Math.max(model.get('below'), 0.0001)).replace('< ', '')}` : percent(prob);

  const paint = () => {
    const edited = model.get('edited'), rows = model.get('rows');
    const head = node('tr', 'gptoss-next-head');
    head.append(...['token', '', 'edited', 'clean'].map(text => node('th', '', text)));
    for (const cell of head.children) cell.scope = 'col';
    table.replaceChildren(...(edited ? [head] : []), ...rows.map(row => {
      const line = node('tr'), name = node('th', 'gptoss-guess'), track = node('td', 'gptoss-track');
      name.scope = 'row';
      putPieces(name, row.pieces);
      name.title = `${piecesText(row.pieces)}  ·  id ${row.id < 0 ? 'shared' : row.id}`;
      track.append(bar('gptoss-now', row.prob ?? 0));
      if (edited) track.append(bar('gptoss-clean', row.clean ?? 0));
      line.append(name, track, node('td', 'gptoss-figure', share(row.prob)));
      if (edited) line.append(node('td', 'gptoss-figure gptoss-quiet', share(row.clean)));
      return line;
    }));
    parts.legend.replaceChildren(node('span', '', 'probability'));
    if (edited) {
      parts.legend.append(node('span', 'gptoss-key gptoss-now', ''), 'edited', node('span', 'gptoss-key gptoss-clean', ''), 'clean');
    }
    parts.detail.textContent = model.get('hint');
  };

  const painting = keepPainted(model, parts, paint);
  return () => painting.stop();
} };
