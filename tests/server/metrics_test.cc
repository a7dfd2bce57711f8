#include "server/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <thread>
#include <vector>

#include "kernels/device.h"
#include "kvstore/host_tier.h"
#include "tests/support/fake_engine.h"

namespace spillway {
namespace {

using testing::HasSubstr;
using testing::Not;

TEST(Metrics, ShowsTheCostModelAndTheKappaOfRequests) {
  const auto metrics = Metrics::Make("m", 100);
  LinkSpeed link;
  link.Measure(3e6, 1e6, 1, 1);
  FakeEngineOptions options;
  options.cost_model = CostModel({.flops_per_token = 1e6, .kv_bytes_per_token = 1e3},
                                 {.linear_flops_per_second = 2e9,
                                  .attention_flops_per_second = 1e9,
                                  .kv_bytes_per_second = 1e9,
                                  .step_floor_seconds = 0.001},
                                 link, 1e6);
  FakeEngine engine(options);
  metrics->Attach(0, engine);
  metrics->ObserverOf(0).OnSequenceDone({.prompt_tokens = 50, .generated_tokens = 1, .kappa = 4, .link_overhead = 2.5});
  const std::string text = metrics->Render();
  const std::string labels = R"({engine="0",model_name="m"})";
  EXPECT_THAT(text, HasSubstr("spillway_kappa_crit" + labels + " 1.5\n"));
  EXPECT_THAT(text, HasSubstr("spillway_flops_per_second" + labels + " 2000000000\n"));
  EXPECT_THAT(text, HasSubstr("spillway_request_kappa_sum" + labels + " 4\n"));
  EXPECT_THAT(text, HasSubstr("spillway_request_link_overhead_sum" + labels + " 2.5\n"));
  EXPECT_THAT(text, HasSubstr("spillway_compute_busy_seconds_total" + labels));
}

TEST(Metrics, ReportsUnderVllmsNames) {
  const auto metrics = Metrics::Make("m", 100);
  FakeEngine engine({});
  metrics->Attach(0, engine);
  EngineObserver& observer = metrics->ObserverOf(0);
  observer.OnStep({.seconds = 0.1, .num_tokens = 20, .num_prefill_tokens = 18, .num_generated = 2, .num_preempted = 1});
  observer.OnPrefixQuery(40, 16);
  observer.OnFirstToken(0.03);
  observer.OnInterToken(0.2);
  observer.OnSequenceDone({.reason = FinishReason::kLength,
                           .prompt_tokens = 40,
                           .cached_tokens = 16,
                           .generated_tokens = 3,
                           .max_tokens = 3,
                           .queue_seconds = 0.1,
                           .first_token_seconds = 0.2,
                           .prefill_seconds = 0.1,
                           .decode_seconds = 0.4,
                           .total_seconds = 0.6});
  observer.OnSequenceDone({.reason = FinishReason::kAborted, .failed = true, .prompt_tokens = 9});
  metrics->OnHttpRequest("/v1/completions", "POST", 404, 0.2);
  metrics->OnRejection("queue_full");
  metrics->OnUnknownField("frobnicate");
  metrics->OnUnknownField("frobnicate");
  const std::string text = metrics->Render();
  const std::string labels = R"({engine="0",model_name="m"})";
  for (const char* line : {"vllm:num_requests_running{} 0",
                           "vllm:num_requests_waiting{} 0",
                           "vllm:kv_cache_usage_perc{} 0",
                           "vllm:prefix_cache_queries_total{} 40",
                           "vllm:prefix_cache_hits_total{} 16",
                           "vllm:num_preemptions_total{} 1",
                           "vllm:prompt_tokens_total{} 40",
                           "vllm:prompt_tokens_cached_total{} 16",
                           "vllm:generation_tokens_total{} 2",
                           "vllm:request_prompt_tokens_count{} 1",
                           "vllm:request_generation_tokens_sum{} 3",
                           "vllm:request_params_max_tokens_count{} 2",
                           "vllm:request_prefill_kv_computed_tokens_sum{} 24",
                           "vllm:iteration_tokens_total_sum{} 20",
                           "vllm:time_to_first_token_seconds_count{} 1",
                           "vllm:inter_token_latency_seconds_count{} 1",
                           "vllm:request_time_per_output_token_seconds_sum{} 0.2",
                           "vllm:e2e_request_latency_seconds_count{} 2",
                           "vllm:request_queue_time_seconds_count{} 2",
                           "vllm:request_inference_time_seconds_sum{} 0.5",
                           "vllm:request_prefill_time_seconds_count{} 1",
                           "vllm:request_decode_time_seconds_count{} 1",
                           "spillway_unknown_fields_total{} 2"}) {
    std::string wanted = line;
    wanted.replace(wanted.find("{}"), 2, labels);
    EXPECT_THAT(text, HasSubstr("\n" + wanted)) << wanted;
  }
  for (const char* line :
       {R"(vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 0)",
        R"(vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="deferred"} 0)",
        R"(vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 24)",
        R"(vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_cache_hit"} 16)",
        R"(vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="external_kv_transfer"} 0)",
        R"(vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 1)",
        R"(vllm:request_success_total{engine="0",finished_reason="error",model_name="m"} 1)",
        R"(vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 0)",
        R"(vllm:admission_rejections_total{engine="0",model_name="m",reason="queue_full"} 1)",
        R"(http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1)",
        R"(http_request_duration_seconds_count{handler="/v1/completions",method="POST"} 1)",
        R"(vllm:time_to_first_token_seconds_bucket{engine="0",model_name="m",le="0.04"} 1)",
        R"(vllm:time_to_first_token_seconds_bucket{engine="0",model_name="m",le="0.02"} 0)",
        R"(vllm:request_prompt_tokens_bucket{engine="0",model_name="m",le="50"} 1)",
        "# TYPE vllm:prompt_tokens_total counter", "# TYPE vllm:num_requests_running gauge",
        "# TYPE vllm:iteration_tokens_total histogram", R"(block_size="16")", R"(num_gpu_blocks="100")"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  EXPECT_THAT(text, Not(HasSubstr(R"(le="200")")));  // lengths go up to max_model_len
}

TEST(Metrics, TiersAreLabelledAndEnginesToldApart) {
  const std::unique_ptr<Device> device = *MakeCpuDevice({});
  const std::unique_ptr<HostTier> host =
      MakeHostTier(*device->Allocate(MemoryKind::kPinnedHost, 4 * 4096), {.block_bytes = 4096, .num_blocks = 4});
  BlockKey key;
  const std::vector<std::int32_t> tokens(kBlockTokens, 1);
  host->Commit(*host->BeginWrite(key, tokens, WriteCause::kPublished), key, tokens);
  ASSERT_TRUE(host->Find(key, tokens).has_value());
  FakeEngineOptions options;
  options.engine.host_tier = host.get();
  options.engine.kv_cache_bytes = 100 * 4096;
  FakeEngine first(options), second(options);
  const auto metrics = Metrics::Make("m", 100, 2);
  metrics->Attach(0, first);
  metrics->Attach(1, second);
  metrics->ObserverOf(0).OnStep({.seconds = 0.2, .num_tokens = 20, .num_prefill_tokens = 20});
  metrics->ObserverOf(1).OnPrefixQuery(64, 32);
  std::string text = metrics->Render();
  for (const char* line : {R"(vllm:num_requests_running{engine="0",model_name="m"} 0)",
                           R"(vllm:num_requests_running{engine="1",model_name="m"} 0)",
                           R"(vllm:prefix_cache_hits_total{engine="1",model_name="m"} 32)",
                           R"(spillway_kv_hits_total{model_name="m",tier="device"} 2)",
                           R"(spillway_kv_misses_total{model_name="m",tier="device"} 2)",
                           R"(spillway_kv_capacity_bytes{model_name="m",tier="device"} 819200)",
                           R"(spillway_kv_hits_total{model_name="m",tier="host"} 1)",
                           R"(spillway_kv_misses_total{model_name="m",tier="host"} 0)",
                           R"(spillway_kv_evictions_total{model_name="m",tier="host"} 0)",
                           R"(spillway_kv_declined_total{model_name="m",tier="host"} 0)",
                           R"(spillway_kv_checksum_failures_total{model_name="m",tier="host"} 0)",
                           R"(spillway_kv_resident_blocks{model_name="m",tier="host"} 1)",
                           R"(spillway_kv_resident_bytes{model_name="m",tier="host"} 4096)",
                           R"(spillway_kv_in_flight{model_name="m",tier="host"} 0)",
                           R"(spillway_prefill_seconds_saved_total{model_name="m",tier="host"} 0.16)",
                           R"(vllm:kv_offload_load_bytes_total{engine="1",model_name="m"} 0)",
                           R"(vllm:kv_offload_stores_skipped_total{engine="0",model_name="m"} 0)",
                           R"(vllm:kv_offload_cpu_cache_usage_perc{engine="0",model_name="m"} 0)",
                           R"(vllm:kv_offload_cpu_cache_write_usage_perc{engine="0",model_name="m"} 0)",
                           R"(vllm:kv_offload_cpu_cache_read_usage_perc{engine="1",model_name="m"} 0)",
                           R"(vllm:kv_offload_cpu_allocation_size_count{engine="0",model_name="m"} 0)",
                           R"(vllm:kv_offload_lookup_sync_delay_seconds_count{engine="0",model_name="m"} 0)",
                           R"(vllm:kv_offload_lookup_async_delay_seconds_count{engine="0",model_name="m"} 0)",
                           R"(vllm:kv_offload_tiering_chunk_queries_total{model_name="m",tier="0:primary"} 1)",
                           R"(vllm:kv_offload_tiering_chunk_hits_total{model_name="m",tier="0:primary"} 1)",
                           R"(vllm:kv_offload_tiering_read_bytes_total{model_name="m",tier="0:primary"} 0)"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  ASSERT_TRUE(host->Find(key, tokens).has_value());
  text = metrics->Render();
  EXPECT_THAT(text, HasSubstr(R"(spillway_prefill_seconds_saved_total{model_name="m",tier="host"} 0.32)"));
}

TEST(Metrics, ManyThreadsCount) {
  const auto metrics = Metrics::Make("m", 100);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) {
        metrics->OnHttpRequest("/health", "GET", 200, 0.1);
        metrics->OnUnknownField("x");
        if (i % 50 == 0) metrics->Render();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(metrics->Render(), HasSubstr(R"(http_requests_total{handler="/health",method="GET",status="2xx"} 800)"));
}

}  // namespace
}  // namespace spillway
