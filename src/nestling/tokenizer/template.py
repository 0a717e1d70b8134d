"""The chat template stored with every chat model, in Jinja: what `conversation.render` does, for other servers.

Form: ChatML. Tools on offer are named in the system turn, calls are Qwen's and Hermes' <tool_call>{json}</tool_call>.
Blank space before an assistant's first word is dropped on both sides, so that the prompt's last token never merges with
the answer: what a model is trained on is then exactly what it continues.
"""

from __future__ import annotations

CHAT_TEMPLATE = """\
{%- set offer = '' -%}
{%- if tools -%}
{%- set offer = 'Tools: ' + (tools | map(attribute='function.name') | join(', ')) -%}
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\\n' + offer + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('unknown role: ' ~ message.role) -}}
{%- endif -%}
{%- set content = message.content or '' -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{{- content.lstrip() -}}
{%- for item in message.tool_calls or [] -%}
{%- set call = item.function or item -%}
{%- set given = call.arguments if call.arguments is string else call.arguments | tojson -%}
{{- '<tool_call>{"name": ' + (call.name | tojson) + ', "arguments": ' + given + '}</tool_call>' -}}
{%- endfor -%}
{%- elif loop.first and message.role == 'system' and offer -%}
{{- content + ('\\n\\n' if content else '') + offer -}}
{%- else -%}
{{- content -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
