"""The npm packages of OpenAI, Anthropic and Vercel (``ai``) against a server of ours, if Node has them.

``npm install openai @anthropic-ai/sdk ai @ai-sdk/openai-compatible``, and NODE_PATH names the folder ``node_modules``.
"""

import json
import shutil
import subprocess

import pytest
from http_server import serving
from patience import until
from provider import OUTPUT, PROMPT, WORDS, Provider

from modelquota import ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware

USED = PROMPT + OUTPUT
TEXT = "".join(WORDS)
UNLIMITED = dict.fromkeys(("max_requests_per_second", "max_tokens_per_second"))
OPENAI = """
const OpenAI = require("openai").default
const client = new OpenAI({baseURL: address + "/v1", apiKey: "none", maxRetries: 0})
const messages = [{role: "user", content: "hello"}]
const answer = await client.chat.completions.create({model: "m", messages})
let streamed = ""
for await (const chunk of await client.chat.completions.create({model: "m", messages, stream: true}))
  streamed += chunk.choices[0]?.delta?.content ?? ""
const refused = async (model, content) => {
  const messages = [{role: "user", content}]
  const error = await client.chat.completions.create({model, max_tokens: 100, messages}).catch(error => error)
  return [error.constructor.name, error.status, error.code]
}
return [answer.choices[0].message.content, streamed, ...await all(refused)]
"""
ANTHROPIC = """
const Anthropic = require("@anthropic-ai/sdk").default
const client = new Anthropic({baseURL: address, apiKey: "none", maxRetries: 0})
const messages = [{role: "user", content: "hello"}]
const answer = await client.messages.create({model: "m", max_tokens: 50, messages})
const streamed = await client.messages.stream({model: "m", max_tokens: 50, messages}).finalText()
const refused = async (model, content) => {
  const messages = [{role: "user", content}]
  const error = await client.messages.create({model, max_tokens: 100, messages}).catch(error => error)
  const kinds = [Anthropic.RateLimitError, Anthropic.BadRequestError, Anthropic.APIError]
  return [kinds.find(kind => error instanceof kind).name, error.status, error.error.error.type]
}
return [answer.content[0].text, streamed, ...await all(refused)]
"""
VERCEL = """
const {generateText, streamText} = require("ai")
const {createOpenAICompatible} = require("@ai-sdk/openai-compatible")
const provider = createOpenAICompatible({name: "ours", baseURL: address + "/v1", includeUsage: true})
const answer = await generateText({model: provider("m"), prompt: "hello", maxRetries: 0})
let streamed = ""
for await (const part of streamText({model: provider("m"), prompt: "hello", maxRetries: 0}).textStream) streamed += part
const refused = async (model, prompt) => {
  const asked = {model: provider(model), prompt, maxOutputTokens: 100, maxRetries: 0}
  const error = await generateText(asked).catch(error => error)
  return [error.name, error.statusCode, JSON.parse(error.responseBody).error.code]
}
return [answer.text, streamed, ...await all(refused)]
"""


@pytest.fixture
def manager():
    with ResourceQuotaManager() as manager:
        manager.set_quota("m", **UNLIMITED)
        manager.set_quota("once", **UNLIMITED, max_requests_per_hour=1, on_violation="reject")
        manager.check_quota("once", 1)
        manager.set_quota("tight", **UNLIMITED, max_tokens_per_hour=50)
        manager.set_quota("busy", **UNLIMITED, max_concurrent_requests=1, on_violation="reject")
        with manager.reserve("busy", 0):
            yield manager


def run(code, manager, *packages):
    """Run an asynchronous function in Node; what it returns."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    found = "".join(f"require.resolve({package!r});" for package in packages)
    if subprocess.run([node, "-e", found], capture_output=True, timeout=30).returncode:
        pytest.skip(f"node does not find {' and '.join(packages)}: npm install them, and set NODE_PATH")
    with serving(QuotaMiddleware(Provider(), manager, max_body_bytes=10_000)) as address:
        program = f"""
const address = {json.dumps(address)};
const all = async refused => [await refused("once", "hello"), await refused("tight", "hello"),
  await refused("m", "x".repeat(20000)), await refused("busy", "hello")];
(async () => {{ {code} }})().then(found => console.log(JSON.stringify(found)))
"""
        done = subprocess.run([node, "-e", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def settled(manager):
    usage = manager.get_usage("m")
    return usage.tokens_this_hour, usage.requests_this_hour, usage.concurrent_requests


def test_openai(manager):
    found = run(OPENAI, manager, "openai")
    assert found == [
        *(TEXT, TEXT),
        ["RateLimitError", 429, "insufficient_quota"],
        ["BadRequestError", 400, "request_exceeds_limit"],
        ["APIError", 413, "body_too_large"],
        ["InternalServerError", 503, "overloaded"],
    ]
    until(lambda: settled(manager) == (2 * USED, 2, 0))


def test_anthropic(manager):
    found = run(ANTHROPIC, manager, "@anthropic-ai/sdk")
    assert found == [
        *(TEXT, TEXT),
        ["RateLimitError", 429, "rate_limit_error"],
        ["BadRequestError", 400, "invalid_request_error"],
        ["APIError", 413, "request_too_large"],
        ["APIError", 529, "overloaded_error"],
    ]
    until(lambda: settled(manager) == (2 * USED, 2, 0))


def test_vercel(manager):
    found = run(VERCEL, manager, "ai", "@ai-sdk/openai-compatible")
    assert found == [
        *(TEXT, TEXT),
        ["AI_APICallError", 429, "insufficient_quota"],
        ["AI_APICallError", 400, "request_exceeds_limit"],
        ["AI_APICallError", 413, "body_too_large"],
        ["AI_APICallError", 503, "overloaded"],
    ]
    until(lambda: settled(manager) == (2 * USED, 2, 0))
