// A conversation as OpenAI's API has it. Tools stay the JSON text they are: JavaScript would write 1.0 as 1.

export class Conversation {
  system = '';
  tools = '';
  messages = [];

  withSystem(messages = this.messages) {
    return this.system ? [{ role: 'system', content: this.system }, ...messages] : messages;
  }

  // JSON of an object with the messages, the tools and other fields.
  request(fields = {}, messages = this.messages) {
    const text = JSON.stringify({ ...fields, messages: this.withSystem(messages) });
    return this.tools ? `${text.slice(0, -1)},"tools":${this.tools}}` : text;
  }

  // What a file of this conversation holds; the chat in a terminal reads it, too.
  fileText() {
    const text = JSON.stringify({ messages: this.withSystem() }, null, 2);
    if (!this.tools) return `${text}\n`;
    return `${text.slice(0, -2)},\n  "tools": ${this.tools.replaceAll('\n', '\n  ')}\n}\n`;
  }

  // The calls at the end of the conversation that have no results yet.
  pendingCalls() {
    let end = this.messages.length;
    while (end > 0 && this.messages[end - 1].role === 'tool') end -= 1;
    const results = this.messages.slice(end);
    const calls = this.messages[end - 1]?.tool_calls ?? [];
    return calls.filter((call, index) =>
      call.id ? !results.some((result) => result.tool_call_id === call.id) : index >= results.length);
  }

  truncate(length) {
    this.messages.length = length;
  }
}

// A response as it comes: `add` takes the chunks of a stream.
export class Response {
  constructor(message = { role: 'assistant', content: '' }) {
    this.message = message;
    this.calls = [];
    this.started = performance.now();
    this.first = null;
    this.last = null;
    this.usage = null;
    this.finishReason = null;
  }

  add(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { content, tool_calls: parts } = choice.delta ?? {};
    if (content || parts?.length) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    if (content) this.message.content += content;
    for (const part of parts ?? []) {
      const index = part.index ?? this.calls.length;
      this.calls[index] ??= { id: '', type: 'function', function: { name: '', arguments: '' } };
      const call = this.calls[index];
      if (part.id) call.id = part.id;
      call.function.name += part.function?.name ?? '';
      call.function.arguments += part.function?.arguments ?? '';
    }
    // Calls that are written, or were when the response was stopped.
    const whole = this.calls.filter((call) => call?.function.name && isJson(call.function.arguments));
    if (whole.length) this.message.tool_calls = whole;
    if (choice.finish_reason) this.finishReason = choice.finish_reason;
  }

  get isEmpty() {
    return !this.message.content.trim() && !this.message.tool_calls;
  }

  // Seconds, tokens and their rate; the first token is the end of reading the prompt.
  stats() {
    const parts = [];
    const tokens = this.usage?.completion_tokens;
    if (tokens !== undefined) parts.push(`${tokens.toLocaleString('en')} token${tokens === 1 ? '' : 's'}`);
    const reading = (this.first - this.started) / 1000;
    const writing = (this.last - this.first) / 1000;
    if (writing > 0) {
      if (tokens > 1) parts.push(`${format((tokens - 1) / writing)} tokens/s`);
      parts.push(`first token after ${format(reading)} s`);
    } else if (this.first !== null) {
      // All at once, as calls come: when the first token was there is not known.
      parts.push(`after ${format(reading)} s`);
    }
    if (this.finishReason === 'length') parts.push('stopped at max tokens');
    return parts.join(' · ');
  }
}

export const format = (number) => number.toFixed(number < 10 ? 2 : number < 100 ? 1 : 0);

export function isJson(text) {
  try {
    JSON.parse(text || '{}');
    return true;
  } catch {
    return false;
  }
}
