// The page: what is typed and pressed, and what is shown.

import { apiKey, getSettings, postJson, setApiKey, streamChat } from './api.js';
import { Conversation, Response, format, isJson } from './conversation.js';
import { readPrompt, showPrompt } from './prompt.js';
import { MarkdownView, button, callView, copy, editForm, element } from './view.js';

const SAMPLING = ['temperature', 'top_p', 'top_k', 'min_p', 'max_tokens', 'seed'];
const NARROW = matchMedia('(max-width: 899px)');
const HINT = 'Enter sends, Shift+Enter begins a new line, Escape stops';
const get = (id) => document.getElementById(id);

const conversation = new Conversation();
// Of messages: the elements of their texts, and what is said below them.
const views = new WeakMap();
const notes = new WeakMap();
let server = { model: '', context: 0 };
let running = null; // The response that comes, and what stops it.
let editing = null; // The message that is being edited.
let typed = new Map(); // Results that are being typed in, by the index of the call.
let toolsError = '';
let isSaved = true;

// --- what is shown

function show() {
  const log = get('messages');
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const { messages } = conversation;
  const shown = messages.map((message, index) => messageView(message, index));
  if (running) shown.push(runningView());
  else if (!messages.length) shown.push(welcome());
  else if (!editing) shown.push(...pendingView());
  log.replaceChildren(...shown);
  log.setAttribute('aria-busy', String(Boolean(running)));
  if (isAtEnd) log.scrollTop = log.scrollHeight;
  const isPending = !running && conversation.pendingCalls().length > 0;
  get('send').hidden = Boolean(running);
  get('stop').hidden = !running;
  get('input').disabled = isPending;
  get('input').placeholder = isPending ? 'The calls above wait for their results' : 'Message';
  for (const id of ['new', 'open', 'save', 'show-prompt']) get(id).disabled = Boolean(running);
}

function messageView(message, index) {
  if (message === editing) return editView(message, index);
  const { role, content } = message;
  const root = element('article', { className: `message ${role}`, 'aria-label': role });
  if (role === 'assistant') {
    if (content) root.append(markdownView(message));
    root.append(...(message.tool_calls ?? []).map(callView));
  } else {
    if (role !== 'user') root.append(element('div', { className: 'tag' }, role === 'tool' ? 'result' : role));
    root.append(element('div', { className: 'text plain', dir: 'auto' }, content));
  }
  const actions = element('div', { className: 'actions' });
  if (notes.get(message)) actions.append(element('span', { className: 'stats' }, notes.get(message)));
  const copying = button('Copy', () => copy(content, copying));
  actions.append(copying);
  if (!running) {
    actions.append(button('Edit', () => { editing = message; show(); root.isConnected || focusEdit(); }));
    if (role === 'assistant') actions.append(button('Regenerate', () => { truncate(index); respond(); }));
    if (role === 'assistant' && index === conversation.messages.length - 1 && !message.tool_calls) {
      actions.append(button('Continue', () => respond(message), { title: 'Have the model go on after this text' }));
    }
  }
  root.append(actions);
  return root;
}

function markdownView(message) {
  const view = views.get(message) ?? new MarkdownView();
  views.set(message, view);
  view.set(message.content);
  return view.root;
}

function editView(message, index) {
  const calls = message.tool_calls ?? [];
  const fields = [{ name: `Text of the ${message.role} message`, text: message.content }];
  fields.push(...calls.map((call) => ({
    name: `Arguments of ${call.function.name}`, text: call.function.arguments, isShown: true,
  })));
  const isAnswered = message.role !== 'assistant';
  const onDone = ([content, ...given]) => {
    const wrong = given.find((text) => !isJson(text));
    if (wrong !== undefined) {
      showError(`Arguments must be JSON: ${wrong}`);
      return;
    }
    const changed = { ...message, content };
    if (calls.length) {
      changed.tool_calls = calls.map((call, at) => ({ ...call, function: { ...call.function, arguments: given[at] } }));
    }
    editing = null;
    truncate(index);
    conversation.messages.push(changed);
    if (isAnswered && !conversation.pendingCalls().length) respond();
    else changedAlone();
  };
  const label = isAnswered ? 'Send' : 'Keep';
  const form = editForm(fields, label, onDone, () => { editing = null; show(); });
  form.title = 'What comes after this message is dropped';
  return form;
}

function focusEdit() {
  get('messages').querySelector('.edit textarea')?.focus();
}

// The response that comes: its text, its calls, and a sign of life before them.
function runningView() {
  const { response } = running;
  const root = element('article', { className: 'message assistant', 'aria-label': 'assistant' });
  if (response.message.content) root.append(markdownView(response.message));
  for (const call of response.calls) if (call) root.append(callView(call));
  root.append(element('div', { className: 'actions' }, running.life));
  return root;
}

function pendingView() {
  const calls = conversation.pendingCalls();
  if (!calls.length) return [];
  const areas = calls.map((call, index) => element('textarea', {
    rows: 2, value: typed.get(index) ?? '', dir: 'auto', className: 'code',
    'aria-label': `Result of ${call.function.name}`, placeholder: `Result of ${call.function.name}`,
    oninput: (event) => typed.set(index, event.target.value),
  }));
  const submit = () => {
    for (const [index, call] of calls.entries()) {
      const result = { role: 'tool', content: areas[index].value };
      if (call.id) result.tool_call_id = call.id;
      conversation.messages.push(result);
    }
    typed = new Map();
    respond();
  };
  const form = element('form', {
    className: 'results', 'aria-label': 'Results of the calls',
    onsubmit: (event) => { event.preventDefault(); submit(); },
    onkeydown: (event) => { if (isSending(event)) { event.preventDefault(); submit(); } },
  });
  calls.forEach((call, index) => form.append(
    element('span', { className: 'note' }, `Result of ${call.function.name}`), areas[index]));
  form.append(element('div', { className: 'actions' },
    element('button', { type: 'submit', className: 'main' }, calls.length > 1 ? 'Send results' : 'Send result')));
  return [form];
}

function welcome() {
  return element('div', { className: 'welcome' },
    element('h2', {}, server.model ? `Chat with ${server.model.split('/').pop()}` : 'Chat'),
    element('p', {}, 'Everything stays between this page and its server. '
      + 'A conversation is gone when the page is closed, unless you save it.'));
}

function showError(text) {
  get('error').hidden = !text;
  get('error').firstElementChild.textContent = text;
  get('retry').hidden = conversation.messages.at(-1)?.role === 'assistant' || !conversation.messages.length;
}

function showContext(tokens) {
  const of = server.context ? ` of ${server.context.toLocaleString('en')}` : '';
  get('context').textContent = `${tokens.toLocaleString('en')}${of} tokens`;
  get('context-bar').max = server.context || 1;
  get('context-bar').value = tokens;
}

async function countContext() {
  if (!conversation.messages.length) {
    showContext(0);
    return;
  }
  try {
    showContext((await readPrompt(conversation)).tokens);
  } catch {
    // What is wrong with it, a request says.
  }
}

// --- what is done

function changedAlone() {
  isSaved = false;
  showError('');
  show();
  countContext();
}

function truncate(length) {
  conversation.truncate(length);
  typed = new Map();
  isSaved = false;
}

function sampling() {
  const given = SAMPLING.map((name) => [name, get(name).valueAsNumber]);
  return Object.fromEntries(given.filter(([, value]) => !Number.isNaN(value)));
}

// Ask for a response to the conversation, or for more of its last message.
async function respond(begun = null) {
  if (running) return;
  showError('');
  if (toolsError) {
    show();
    showError(toolsError);
    return;
  }
  if (begun) conversation.messages.pop();
  const asked = begun ? [...conversation.messages, { ...begun, prefix: true }] : conversation.messages;
  const response = new Response(begun ? { ...begun } : undefined);
  const abort = new AbortController();
  const life = element('span', { className: 'stats life' });
  running = { response, abort, life };
  isSaved = false;
  const tick = () => {
    const seconds = format((performance.now() - response.started) / 1000);
    life.textContent = response.first === null ? `Reading the prompt, ${seconds} s` : `Writing, ${seconds} s`;
  };
  const timer = setInterval(tick, 100);
  tick();
  get('status').textContent = 'The model responds';
  const log = get('messages');
  log.scrollTop = log.scrollHeight;
  show();
  let problem = '';
  let remark = '';
  try {
    const fields = { model: server.model, stream: true, stream_options: { include_usage: true }, ...sampling() };
    await streamChat(conversation.request(fields, asked), abort.signal, (chunk) => {
      response.add(chunk);
      showRunning();
    });
  } catch (error) {
    if (error.name === 'AbortError') remark = 'stopped';
    else {
      problem = error.message;
      remark = 'interrupted';
      if (error.status === 401) askForKey();
    }
  }
  clearInterval(timer);
  running = null;
  finish(response, begun, remark, problem);
}

function showRunning() {
  const log = get('messages');
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  log.lastElementChild.replaceWith(runningView());
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function finish(response, begun, remark, problem) {
  if (response.isEmpty) {
    // No prompt can hold an empty response.
    if (begun) conversation.messages.push(begun);
  } else {
    const { message } = response;
    notes.set(message, [response.stats(), remark].filter(Boolean).join(' · '));
    conversation.messages.push(message);
  }
  show();
  if (problem) showError(problem);
  else if (response.isEmpty && !begun) showError(remark ? 'Stopped before the first token.' : 'The response was empty.');
  get('status').textContent = problem || !conversation.pendingCalls().length ? HINT : 'The model calls a function';
  const { usage } = response;
  if (usage && !remark) showContext(usage.prompt_tokens + usage.completion_tokens);
  else countContext();
  (get('messages').querySelector('.results textarea') ?? get('input')).focus();
}

function send() {
  const text = get('input').value;
  if (!text.trim() || running || get('input').disabled) return;
  conversation.messages.push({ role: 'user', content: text });
  get('input').value = '';
  editing = null;
  fit();
  get('messages').scrollTop = get('messages').scrollHeight;
  respond();
}

const isSending = (event) => event.key === 'Enter' && !event.shiftKey && !event.isComposing;

// The composer is as high as its text.
function fit() {
  const area = get('input');
  area.rows = Math.min(12, area.value.split('\n').length);
}

async function takeTools(text) {
  const note = get('tools-note');
  toolsError = '';
  conversation.tools = '';
  note.classList.remove('wrong');
  get('tools').value = text;
  if (!text.trim()) {
    note.textContent = "JSON definitions as OpenAI's API has them";
  } else {
    try {
      const read = await postJson('tools', { text });
      if (get('tools').value !== text) return;
      conversation.tools = read.text;
      note.textContent = `The model may call ${read.names.join(', ') || 'nothing'}`;
    } catch (error) {
      toolsError = error.message;
      note.textContent = error.message;
      note.classList.add('wrong');
    }
  }
  countContext();
}

async function openConversation(file) {
  try {
    const read = await postJson('conversation', { text: await file.text() });
    conversation.messages = read.messages;
    typed = new Map();
    editing = null;
    conversation.system = read.system;
    get('system').value = read.system;
    await takeTools(read.tools);
    changedAlone();
    isSaved = true;
    get('messages').scrollTop = get('messages').scrollHeight;
  } catch (error) {
    showError(`${file.name}: ${error.message}`);
    get('retry').hidden = true;
  }
}

function saveConversation() {
  if (!conversation.messages.length) {
    showError('There is nothing to save yet.');
    return;
  }
  const address = URL.createObjectURL(new Blob([conversation.fileText()], { type: 'application/json' }));
  const time = new Date().toISOString().slice(0, 19).replaceAll(/[T:]/g, '-');
  element('a', { href: address, download: `conversation-${time}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
  isSaved = true;
}

function askForKey() {
  openSettings(true);
  get('key').focus();
}

function openSettings(isOpen) {
  get('settings').hidden = !isOpen;
  get('toggle').setAttribute('aria-expanded', String(isOpen));
}

async function start() {
  try {
    server = await getSettings();
    document.title = server.model.split('/').pop();
    get('model').textContent = server.model.split('/').pop();
    get('model').title = server.model;
    showError('');
  } catch (error) {
    showError(error.message);
    if (error.status === 401) askForKey();
  }
  show();
  countContext();
}

async function openPrompt() {
  const draft = get('input').value;
  const messages = [...conversation.messages];
  if (draft.trim()) messages.push({ role: 'user', content: draft });
  if (!messages.length) {
    showError('There is no prompt yet: write a message first.');
    return;
  }
  try {
    await showPrompt(conversation, messages);
  } catch (error) {
    showError(error.message);
  }
}

// --- what is pressed

get('composer').onsubmit = (event) => { event.preventDefault(); send(); };
get('input').oninput = fit;
get('input').onkeydown = (event) => { if (isSending(event)) { event.preventDefault(); send(); } };
get('stop').onclick = () => running?.abort.abort();
get('retry').onclick = () => respond();
get('new').onclick = () => {
  if (!isSaved && !confirm('Begin a new conversation? This one was not saved.')) return;
  editing = null;
  truncate(0);
  isSaved = true;
  showError('');
  show();
  countContext();
  get('input').focus();
};
get('save').onclick = saveConversation;
get('show-prompt').onclick = openPrompt;
get('toggle').onclick = () => openSettings(get('settings').hidden);
get('system').oninput = () => { conversation.system = get('system').value; isSaved = !conversation.messages.length; };
get('system').onchange = countContext;
get('tools').onchange = () => takeTools(get('tools').value);
get('key').value = apiKey();
get('key').onchange = () => { setApiKey(get('key').value.trim()); start(); };
for (const [id, take] of [['conversation-file', openConversation], ['tools-file', async (f) => takeTools(await f.text())]]) {
  get(id).onchange = async () => {
    const [file] = get(id).files;
    if (file) await take(file);
    get(id).value = '';
  };
}
get('open').onclick = () => get('conversation-file').click();
get('open-tools').onclick = () => get('tools-file').click();
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && !get('prompt').open) running?.abort.abort();
});
addEventListener('beforeunload', (event) => { if (!isSaved && conversation.messages.length) event.preventDefault(); });

openSettings(!NARROW.matches);
start();
