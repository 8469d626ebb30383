"""The chat template of the checkpoints that we make: ChatML, and tools in the Hermes format when a request has some.

A checkpoint may put ``{% set default_system = … %}`` before it: the system message of chats that bring none.
"""

CHATML_TEMPLATE = r"""
{%- set has_system = messages[0].role == 'system' -%}
{%- set system = messages[0].content if has_system else default_system | default('') -%}
{%- if has_system or system or tools -%}
    {{- '<|im_start|>system\n' + (system or '') -}}
    {%- if tools -%}
        {{- ('\n\n' if system else '') + 'You have these tools, one a line:\n<tools>\n' -}}
        {%- for tool in tools -%}
            {{- (tool | tojson) + '\n' -}}
        {%- endfor -%}
        {{- '</tools>\nTo call a tool, answer with its name and arguments, one block a call:\n' -}}
        {{- '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}
            {{- '<|im_start|>user\n' -}}
        {%- endif -%}
        {{- '<tool_response>\n' + (message.content or '') + '\n</tool_response>' -}}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '\n' -}}
    {%- elif not (loop.first and has_system) -%}
        {{- '<|im_start|>' + message.role + '\n' + (message.content or '') -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set arguments = call.function.arguments -%}
            {{- '\n' if message.content or not loop.first else '' -}}
            {{- '<tool_call>\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' -}}
            {{- (arguments if arguments is string else arguments | tojson) + '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".strip()
