// Messages as they are shown, edited and written.

import { format, isJson } from './conversation.js';
import { MarkdownView, button, copy, element } from './view.js';

// Of messages: the elements of their texts, and what is said below them.
const views = new WeakMap();
const notes = new WeakMap();

export const setNote = (message, note) => notes.set(message, note);

// Whether a key sends: not while a word is put together with an input method.
export const isSending = (event) => event.key === 'Enter' && !event.shiftKey && !event.isComposing;

// A message; `actions` are what its buttons do, null for none.
export function messageView(message, actions) {
  const { role, content } = message;
  const root = element('article', { className: `message ${role}`, 'aria-label': role });
  if (role === 'assistant') {
    if (content) root.append(markdownOf(message));
    root.append(...(message.tool_calls ?? []).map(callView));
  } else {
    if (role !== 'user') root.append(element('div', { className: 'tag' }, role === 'tool' ? 'result' : role));
    root.append(element('div', { className: 'text plain', dir: 'auto' }, content));
  }
  const buttons = element('div', { className: 'actions' });
  if (notes.get(message)) buttons.append(element('span', { className: 'stats' }, notes.get(message)));
  if (content) buttons.append(button('Copy', (event) => copy(content, event.target)));
  if (actions) {
    buttons.append(button('Edit', actions.edit));
    if (role === 'assistant') buttons.append(button('Regenerate', actions.regenerate));
    if (role === 'assistant' && actions.proceed && !message.tool_calls) {
      buttons.append(button('Continue', actions.proceed, { title: 'Have the model go on after this text' }));
    }
  }
  root.append(buttons);
  return root;
}

function markdownOf(message) {
  const view = views.get(message) ?? new MarkdownView();
  views.set(message, view);
  view.set(message.content);
  return view.root;
}

function callView(call) {
  return element('div', { className: 'call' },
    element('div', { className: 'call-name' }, element('span', { className: 'tag' }, 'calls'), ` ${call.function.name}`),
    element('pre', { tabIndex: 0 }, indented(call.function.arguments)));
}

// JSON on lines of its own, unless JavaScript would write one of its numbers otherwise.
function indented(text) {
  try {
    const value = JSON.parse(text);
    const isSame = JSON.stringify(value) === text.replace(/("(?:[^"\\]|\\.)*")|\s+/g, '$1');
    return isSame ? JSON.stringify(value, null, 2) : text;
  } catch {
    return text;
  }
}

// The response that comes: its text, its calls, and a sign of life.
export class RunningView {
  #response;
  #calls = element('div');
  #life = element('span', { className: 'stats life' });
  root = element('article', { className: 'message assistant', 'aria-label': 'assistant' });

  constructor(response) {
    this.#response = response;
    this.root.append(this.#calls, element('div', { className: 'actions' }, this.#life));
    this.update();
  }

  update() {
    const { message, calls, started, first } = this.#response;
    if (message.content) {
      const text = markdownOf(message);
      if (!text.isConnected || text.parentNode !== this.root) this.root.prepend(text);
    }
    this.#calls.replaceChildren(...calls.filter(Boolean).map(callView));
    const seconds = format((performance.now() - started) / 1000);
    this.#life.textContent = first === null ? `Reading the prompt, ${seconds} s` : `Writing, ${seconds} s`;
  }
}

// A form instead of a message; `onDone` gets the changed message.
export function editView(message, onDone, onCancel) {
  const calls = message.tool_calls ?? [];
  const fields = [[`Text of the ${message.role} message`, message.content]];
  for (const call of calls) fields.push([`Arguments of ${call.function.name}`, call.function.arguments]);
  const areas = fields.map(([name, text], index) => element('textarea', {
    value: text, rows: Math.min(20, text.split('\n').length + 1), 'aria-label': name, dir: 'auto',
    className: index ? 'code' : '',
  }));
  const submit = () => {
    const [content, ...given] = areas.map((area) => area.value);
    const wrong = given.findIndex((text) => !isJson(text));
    areas.forEach((area, index) => area.setCustomValidity(index === wrong + 1 && wrong >= 0 ? 'This must be JSON' : ''));
    if (wrong >= 0) {
      areas[wrong + 1].reportValidity();
      return;
    }
    const changed = { ...message, content };
    if (calls.length) {
      changed.tool_calls = calls.map((call, at) => ({ ...call, function: { ...call.function, arguments: given[at] } }));
    }
    onDone(changed);
  };
  const form = makeForm('edit', submit);
  form.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape') return;
    event.stopPropagation();
    onCancel();
  });
  areas.forEach((area, index) => form.append(...(index ? [note(fields[index][0])] : []), area));
  form.append(element('div', { className: 'actions' },
    element('button', { type: 'submit', className: 'main' }, message.role === 'assistant' ? 'Keep' : 'Send'),
    button('Cancel', onCancel), note('Messages after this one are dropped')));
  return form;
}

// The form for the results of calls; `typed` keeps what was typed, `onDone` gets the messages.
export function resultsForm(calls, typed, onDone) {
  const areas = calls.map((call, index) => element('textarea', {
    rows: 2, value: typed.get(index) ?? '', dir: 'auto', className: 'code',
    'aria-label': `Result of ${call.function.name}`,
    oninput: (event) => typed.set(index, event.target.value),
  }));
  const form = makeForm('results', () => onDone(calls.map((call, index) => ({
    role: 'tool', ...(call.id ? { tool_call_id: call.id } : {}), content: areas[index].value,
  }))));
  calls.forEach((call, index) => form.append(note(`Result of ${call.function.name}`), areas[index]));
  form.append(element('div', { className: 'actions' },
    element('button', { type: 'submit', className: 'main' }, calls.length > 1 ? 'Send results' : 'Send result')));
  return form;
}

const note = (text) => element('span', { className: 'note' }, text);

function makeForm(className, submit) {
  return element('form', {
    className,
    onsubmit: (event) => { event.preventDefault(); submit(); },
    onkeydown: (event) => {
      if (event.target.tagName !== 'TEXTAREA' || !isSending(event)) return;
      event.preventDefault();
      submit();
    },
  });
}

export function welcome(model) {
  return element('div', { className: 'welcome' },
    element('h2', {}, model ? `Chat with ${model.split('/').pop()}` : 'Chat'),
    element('p', {}, 'A conversation stays between this page and its server. '
      + 'It is gone when the page is closed, unless you save it.'));
}
