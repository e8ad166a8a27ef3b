"""HTTP: shapes in, shapes out, no policy.

edge       every request: its id, its count in the metrics, a last resort for what nobody foresaw
body       bytes -> JSON -> shape, within the size bound; every refusal names its field
shapes_*   what the providers' formats look like; tolerated: the fields that may stand there unused
translate  shape -> the one ChatRequest / CompletionRequest
delivery   events -> one answer or a stream; a client that goes away closes the backend's stream
*_answer   events -> the provider's JSON; sse: the framing
errors     every error -> the provider's JSON and status
connection the time a request's headers may take
server     uvicorn with a drain between "stop" and the end
"""
