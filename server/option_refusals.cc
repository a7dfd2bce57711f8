#include <array>

#include "server/option_table.h"

namespace spillway {
namespace {

constexpr std::string_view kParallel =
    "an engine is one model on one device; tensor, pipeline and expert parallelism are not built";
constexpr std::string_view kDataParallel = "the engines of --data-parallel-size are threads of one process";
constexpr std::string_view kLora = "LoRA adapters are not built";
constexpr std::string_view kMultimodal = "text only; images, audio and video are not built";
constexpr std::string_view kQuantized = "quantized KV is not built";
constexpr std::string_view kSpeculative = "speculative decoding is not built";
constexpr std::string_view kStructured = "structured output is not built";
constexpr std::string_view kTools = "tool calls and reasoning parsers are not built";
constexpr std::string_view kTls = "TLS is not built; put a proxy in front";
constexpr std::string_view kTiers = "KV tiers below the device are not built";
constexpr std::string_view kPolicies = "the scheduler has no such policy; see --scheduling-policy";
constexpr std::string_view kEvents = "KV events are not built";
constexpr std::string_view kPython = "there is no Python in this process";
constexpr std::string_view kTorch = "there is no PyTorch and no compiler in this process; kernels are fixed";
constexpr std::string_view kHub = "models are read from a local folder or the local Hub cache; nothing is downloaded";
constexpr std::string_view kTokenizer = "the tokenizer is the one in the model's folder";
constexpr std::string_view kFormat = "weights are read from safetensors files only";
constexpr std::string_view kGenerate = "generation only; pooling, embedding and scoring models are not built";
constexpr std::string_view kTracing = "tracing is not built; /metrics has the latencies";
constexpr std::string_view kLogging = "requests are not logged; --log-level sets what is";
constexpr std::string_view kMetrics = "the metrics are fixed";
constexpr std::string_view kCors = "cross-origin headers are not built; put a proxy in front";
constexpr std::string_view kMemory = "the KV cache is sized by --kv-cache-memory-bytes";
constexpr std::string_view kRemote = "engine and front ends are one process; there are no workers to set up";
constexpr std::string_view kTemplate =
    "the chat format is chosen by the checkpoint's special tokens; templates are not built";
constexpr std::string_view kSliding = "sliding-window and hybrid models are not built";
constexpr std::string_view kSeed = "a request without a seed draws one; give `seed` in the request";
constexpr std::string_view kDev = "the control surface asks for --admin-api-key; there is no development mode";

// The flags of `vllm serve` that Spillway does not take.
constexpr auto kRefused = std::to_array<RefusedFlag>({
    {"tensor-parallel-size", kParallel},
    {"pipeline-parallel-size", kParallel},
    {"data-parallel-size-local", kDataParallel},
    {"data-parallel-rank", kDataParallel},
    {"data-parallel-start-rank", kDataParallel},
    {"data-parallel-address", kDataParallel},
    {"data-parallel-rpc-port", kDataParallel},
    {"data-parallel-backend", kDataParallel},
    {"data-parallel-hybrid-lb", kDataParallel},
    {"data-parallel-external-lb", kDataParallel},
    {"decode-context-parallel-size", kParallel},
    {"prefill-context-parallel-size", kParallel},
    {"enable-expert-parallel", kParallel},
    {"all2all-backend", kParallel},
    {"enable-eplb", kParallel},
    {"eplb-config", kParallel},
    {"expert-placement-strategy", kParallel},
    {"enable-dbo", kParallel},
    {"dbo-decode-token-threshold", kParallel},
    {"dbo-prefill-token-threshold", kParallel},
    {"disable-custom-all-reduce", kParallel},
    {"max-parallel-loading-workers", kParallel},
    {"nnodes", kParallel},
    {"node-rank", kParallel},
    {"master-addr", kParallel},
    {"master-port", kParallel},
    {"distributed-executor-backend", kRemote},
    {"ray-workers-use-nsight", kRemote},
    {"worker-cls", kRemote},
    {"worker-extension-cls", kRemote},
    {"api-server-count", kRemote},
    {"headless", kRemote},
    {"disable-frontend-multiprocessing", kRemote},
    {"stream-interval", kRemote},
    {"enable-lora", kLora},
    {"enable-lora-bias", kLora},
    {"lora-modules", kLora},
    {"max-loras", kLora},
    {"max-lora-rank", kLora},
    {"max-cpu-loras", kLora},
    {"lora-dtype", kLora},
    {"lora-extra-vocab-size", kLora},
    {"fully-sharded-loras", kLora},
    {"default-mm-loras", kLora},
    {"limit-mm-per-prompt", kMultimodal},
    {"mm-processor-kwargs", kMultimodal},
    {"mm-processor-cache-gb", kMultimodal},
    {"mm-processor-cache-type", kMultimodal},
    {"mm-shm-cache-max-object-size-mb", kMultimodal},
    {"mm-encoder-tp-mode", kMultimodal},
    {"mm-encoder-attn-backend", kMultimodal},
    {"media-io-kwargs", kMultimodal},
    {"interleave-mm-strings", kMultimodal},
    {"skip-mm-profiling", kMultimodal},
    {"video-pruning-rate", kMultimodal},
    {"enable-mm-embeds", kMultimodal},
    {"allowed-local-media-path", kMultimodal},
    {"allowed-media-domains", kMultimodal},
    {"disable-chunked-mm-input", kMultimodal},
    {"enable-prompt-embeds", kMultimodal},
    {"kv-cache-dtype", kQuantized},
    {"calculate-kv-scales", kQuantized},
    {"speculative-config", kSpeculative},
    {"structured-outputs-config", kStructured},
    {"logits-processor-pattern", kStructured},
    {"logits-processors", kPython},
    {"enable-auto-tool-choice", kTools},
    {"exclude-tools-when-tool-choice-none", kTools},
    {"tool-call-parser", kTools},
    {"tool-parser-plugin", kTools},
    {"tool-server", kTools},
    {"reasoning-parser", kTools},
    {"reasoning-parser-plugin", kTools},
    {"ssl-keyfile", kTls},
    {"ssl-certfile", kTls},
    {"ssl-ca-certs", kTls},
    {"ssl-cert-reqs", kTls},
    {"ssl-ciphers", kTls},
    {"enable-ssl-refresh", kTls},
    {"kv-offloading-backend", kTiers},
    {"kv-transfer-config", kTiers},
    {"ec-transfer-config", kTiers},
    {"cpu-offload-gb", kTiers},
    {"swap-space", kTiers},
    {"kv-sharing-fast-prefill", kTiers},
    {"scheduler-cls", kPolicies},
    {"max-num-partial-prefills", kPolicies},
    {"max-long-partial-prefills", kPolicies},
    {"enable-chunked-prefill", "prompts are always computed in chunks of the token budget"},
    {"kv-events-config", kEvents},
    {"prefix-caching-hash-algo", "always sha256_cbor"},
    {"max-num-queued-tokens", kPolicies},
    {"middleware", kPython},
    {"root-path", kCors},
    {"allow-credentials", kCors},
    {"allowed-origins", kCors},
    {"allowed-methods", kCors},
    {"allowed-headers", kCors},
    {"compilation-config", kTorch},
    {"cuda-graph-sizes", kTorch},
    {"max-seq-len-to-capture", kTorch},
    {"cudagraph-capture-sizes", kTorch},
    {"max-cudagraph-capture-size", kTorch},
    {"optimization-level", kTorch},
    {"attention-backend", kTorch},
    {"attention-config", kTorch},
    {"kernel-config", kTorch},
    {"additional-config", kTorch},
    {"model-impl", kTorch},
    {"hf-token", kHub},
    {"hf-overrides", kHub},
    {"hf-config-path", kHub},
    {"config-format", kFormat},
    {"revision", kHub},
    {"code-revision", kHub},
    {"tokenizer-revision", kTokenizer},
    {"tokenizer", kTokenizer},
    {"tokenizer-mode", kTokenizer},
    {"tokenizer-pool-size", kTokenizer},
    {"skip-tokenizer-init", kTokenizer},
    {"trust-remote-code", kPython},
    {"download-dir", kHub},
    {"load-format", kFormat},
    {"safetensors-load-strategy", kFormat},
    {"model-loader-extra-config", kFormat},
    {"ignore-patterns", kFormat},
    {"use-tqdm-on-load", kFormat},
    {"pt-load-map-location", kFormat},
    {"enable-sleep-mode", kDev},
    {"runner", kGenerate},
    {"convert", kGenerate},
    {"task", kGenerate},
    {"override-pooler-config", kGenerate},
    {"pooler-config", kGenerate},
    {"collect-detailed-traces", kTracing},
    {"otlp-traces-endpoint", kTracing},
    {"show-hidden-metrics-for-version", kMetrics},
    {"kv-cache-metrics", kMetrics},
    {"kv-cache-metrics-sample", kMetrics},
    {"cudagraph-metrics", kMetrics},
    {"enable-mfu-metrics", kMetrics},
    {"enable-layerwise-nvtx-tracing", kTracing},
    {"profiler-config", kTracing},
    {"enable-server-load-tracking", kMetrics},
    {"disable-log-stats", kMetrics},
    {"aggregate-engine-logging", kLogging},
    {"enable-log-requests", kLogging},
    {"disable-log-requests", kLogging},
    {"max-log-len", kLogging},
    {"enable-log-outputs", kLogging},
    {"enable-log-deltas", kLogging},
    {"log-error-stack", kLogging},
    {"log-config-file", kLogging},
    {"disable-uvicorn-access-log", kLogging},
    {"disable-access-log-for-endpoints", kLogging},
    {"enable-request-id-headers", "every answer has its request id in the body"},
    {"enable-force-include-usage", "usage is sent where the request asks for it"},
    {"enable-prompt-tokens-details", "usage always tells the cached prompt tokens"},
    {"enable-tokenizer-info-endpoint", "/tokenizer_info is not built"},
    {"return-tokens-as-token-ids", "ask for it in the request where it is supported"},
    {"tokens-only", "text and token ids are always taken"},
    {"disable-fastapi-docs", "there are no documentation pages to hide"},
    {"num-gpu-blocks-override", kMemory},
    {"disable-sliding-window", kSliding},
    {"disable-cascade-attn", "there is one attention kernel"},
    {"disable-hybrid-kv-cache-manager", kSliding},
    {"mamba-cache-dtype", kSliding},
    {"mamba-ssm-cache-dtype", kSliding},
    {"mamba-block-size", kSliding},
    {"seed", kSeed},
    {"max-logprobs", "20, fixed"},
    {"logprobs-mode", "log probabilities are always of the raw logits"},
    {"override-generation-config", "edit generation_config.json, or use --generation-config vllm"},
    {"override-attention-dtype", "attention runs in --dtype"},
    {"chat-template", kTemplate},
    {"chat-template-content-format", kTemplate},
    {"trust-request-chat-template", kTemplate},
    {"default-chat-template-kwargs", kTemplate},
    {"response-role", kTemplate},
    {"io-processor-plugin", kPython},
    {"enable-return-routed-experts", kParallel},
    {"weight-transfer-config", kRemote},
    {"uds", "Unix sockets are not built"},
    {"uvicorn-access-log", kLogging},
    {"h11-max-header-count", "headers are limited by --max-header-bytes"},
});

}  // namespace

std::span<const RefusedFlag> RefusedFlags() { return kRefused; }

}  // namespace spillway
