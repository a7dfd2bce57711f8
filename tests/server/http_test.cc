// HTTP itself: connections, limits, timeouts, disconnects, draining.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <thread>

#include "absl/time/clock.h"
#include "tests/server/http_client.h"

namespace spillway {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr char kShort[] = R"({"prompt": "hi", "max_tokens": 3})";
constexpr char kLongStream[] = R"({"prompt": "hi", "max_tokens": 3000, "stream": true})";

TEST(Http, ProbesAndInformation) {
  TestServer server;
  Client client = server.Connect();
  for (const char* path : {"/health", "/ready", "/ping"}) {
    const ClientResponse response = client.Get(path);
    EXPECT_EQ(response.status, 200) << path;
    EXPECT_EQ(response.body, "");
  }
  EXPECT_EQ(client.Post("/ping", "").status, 200);
  EXPECT_EQ(client.Get("/version").Json()["version"], "0.1.0");
  EXPECT_EQ(client.Get("/load").Json()["server_load"], 0);
  const auto models = client.Get("/v1/models").Json();
  EXPECT_EQ(models["data"][0]["id"], "fake");
  EXPECT_EQ(models["data"][1]["id"], "alias");
  EXPECT_EQ(models["data"][0]["max_model_len"], 4096);
  client.Post("/v1/completions", kShort);
  const ClientResponse metrics = client.Get("/metrics?x=1");
  EXPECT_THAT(metrics.Header("Content-Type"), HasSubstr("version=0.0.4"));
  EXPECT_THAT(metrics.body,
              HasSubstr(R"(http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1)"));
}

TEST(Http, UnknownPathsAndMethods) {
  TestServer server;
  Client client = server.Connect();
  const ClientResponse missing = client.Get("/v2/none");
  EXPECT_EQ(missing.status, 404);
  EXPECT_EQ(missing.Json()["error"]["type"], "NotFoundError");
  const ClientResponse wrong = client.Get("/v1/completions");
  EXPECT_EQ(wrong.status, 405);
  EXPECT_EQ(wrong.Header("Allow"), "POST");
  EXPECT_EQ(wrong.Json()["error"]["code"], 405);
  client.Send("HEAD /health HTTP/1.1\r\n\r\n");  // no body follows, whatever its length
  EXPECT_EQ(client.ReadHead().status, 405);
  EXPECT_EQ(client.Get("/health").status, 200);
}

TEST(Http, KeysGuardInferenceOnly) {
  TestServer server([](auto& options) { options.frontend.api_keys = {"first", "second"}; });
  Client client = server.Connect();
  for (const char* header :
       {"", "Authorization: Bearer wrong\r\n", "Authorization: Bearer \r\n", "Authorization: first\r\n",
        "Authorization: Bearer firs\r\n", "Authorization: Bearer firstx\r\n"}) {
    const ClientResponse response = client.Post("/v1/completions", kShort, header);
    EXPECT_EQ(response.status, 401) << header;
    EXPECT_EQ(response.Json()["error"]["code"], 401);
    EXPECT_EQ(response.Header("WWW-Authenticate"), "Bearer");
  }
  for (const char* path : {"/tokenize", "/detokenize", "/v1/chat/completions"})
    EXPECT_EQ(client.Post(path, "{}").status, 401);
  EXPECT_EQ(client.Get("/v1/models").status, 401);
  EXPECT_EQ(client.Get("/v1/none").status, 401);
  for (const char* path : {"/health", "/ready", "/metrics", "/version"}) EXPECT_EQ(client.Get(path).status, 200);
  EXPECT_EQ(client.Post("/v1/completions", kShort, "Authorization: Bearer first\r\n").status, 200);
  EXPECT_EQ(client.Post("/v1/completions", kShort, "authorization: bearer second\r\n").status, 200);
}

TEST(Http, TheControlSurfaceNeedsItsKeyOrItsPort) {
  struct Surface {
    const char* method;
    const char* path;
  };
  constexpr Surface kSurface[] = {
      {"POST", "/reset_prefix_cache"}, {"GET", "/server_info"}, {"GET", "/spillway/cost_model"}};
  {
    TestServer closed([](TestServer::Options& options) { options.frontend.api_keys = {"user"}; });
    Client client = closed.Connect();
    for (const auto& [method, path] : kSurface) {
      client.Send(Client::Format(method, path, "", "Authorization: Bearer user\r\n"));
      const ClientResponse response = client.Read();
      EXPECT_EQ(response.status, 404) << path;
      EXPECT_THAT(response.body, AllOf(HasSubstr("--admin-api-key"), HasSubstr("--admin-port")));
    }
    EXPECT_EQ(closed.engine->num_resets(), 0);
  }
  {
    TestServer keyed([](TestServer::Options& options) {
      options.frontend.api_keys = {"user"};
      options.frontend.admin_api_key = "admin";
      options.frontend.configuration = {{"port", "8000"}, {"api-key", "(set)"}};
    });
    Client client = keyed.Connect();
    for (const auto& [method, path] : kSurface) {
      for (const char* header : {"", "Authorization: Bearer user\r\n", "Authorization: Bearer \r\n"}) {
        client.Send(Client::Format(method, path, "", header));
        EXPECT_EQ(client.Read().status, 401) << path << header;
      }
    }
    EXPECT_EQ(client.Get("/v1/models", "Authorization: Bearer admin\r\n").status, 401) << "it is no key of inference";
    const ClientResponse reset = client.Post("/reset_prefix_cache", "", "Authorization: Bearer admin\r\n");
    EXPECT_EQ(reset.status, 200);
    EXPECT_EQ(reset.Json()["success"], true);
    EXPECT_EQ(keyed.engine->num_resets(), 1);
    const ClientResponse info = client.Get("/server_info", "Authorization: Bearer admin\r\n");
    EXPECT_EQ(info.Json()["configuration"]["api-key"], "(set)");
    EXPECT_EQ(info.Json()["kv_blocks"], 100);
    EXPECT_EQ(client.Get("/reset_prefix_cache").status, 405);
  }
  TestServer port([](TestServer::Options& options) {
    options.frontend.api_keys = {"user"};
    options.frontend.is_admin_port = true;
  });
  Client client = port.Connect();
  EXPECT_EQ(client.Post("/reset_prefix_cache", "").status, 200);
  EXPECT_EQ(client.Get("/server_info").status, 200);
  EXPECT_EQ(client.Get("/spillway/cost_model").status, 404) << "the engine has none";
  EXPECT_EQ(client.Get("/v1/models").status, 401);
  EXPECT_EQ(port.engine->num_resets(), 1);
}

TEST(Http, CostModelTellsSpeedsAndWhatFollowsFromThem) {
  LinkSpeed link;
  link.Measure(3e6, 1e6, 1, 1);
  TestServer server([&](TestServer::Options& options) {
    options.engine.cost_model =
        CostModel({.flops_per_token = 1e6, .attention_flops_per_key = 1e3, .kv_bytes_per_token = 1e3},
                  {.linear_flops_per_second = 2e9,
                   .attention_flops_per_second = 1e9,
                   .kv_bytes_per_second = 1e9,
                   .step_floor_seconds = 0.001},
                  link, 1e6);
    options.frontend.admin_api_key = "admin";
  });
  Client client = server.Connect();
  const ClientResponse response = client.Get("/spillway/cost_model", "Authorization: Bearer admin\r\n");
  ASSERT_EQ(response.status, 200);
  EXPECT_EQ(response.Header("Content-Type"), "application/json");
  const auto model = response.Json();
  EXPECT_DOUBLE_EQ(model["kappa_crit"], 1.5);
  EXPECT_EQ(model["model"]["kv_bytes_per_token"], 1e3);
  EXPECT_EQ(model["compute"]["linear_flops_per_second"], 2e9);
  EXPECT_DOUBLE_EQ(model["link"]["bytes_per_second"], 3e6);
  ASSERT_EQ(model["link"]["by_copy_size"].size(), 1U);
  EXPECT_EQ(model["link"]["by_copy_size"][0]["copy_bytes"], 1e6);
  EXPECT_NEAR(model["critical_chunk_tokens"], 1e3 / 3 - 1, 1e-6);  // reading a loaded token takes 1 us of the 333
  const auto& effective = model["kappa_crit_at"];
  EXPECT_EQ(effective.front()["new_tokens"], 1);
  EXPECT_GT(effective.front()["kappa_crit"], 1.5) << "a step has a floor";
  EXPECT_TRUE(effective.back()["kappa_crit"].is_null()) << "so many new tokens hide the load of any prefix";
}

TEST(Http, TenantIsTheFairnessHeaderElseTheKey) {
  TestServer server([](auto& options) { options.frontend.api_keys = {"first", "second"}; });
  Client client = server.Connect();
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "key-2"},
      {"x-llm-d-inference-fairness-id: d\r\n", "d"},
      {"X-Gateway-Inference-Fairness-Id: g\r\nx-llm-d-inference-fairness-id: d\r\n", "g"}};
  for (const auto& [header, tenant] : cases) {
    EXPECT_EQ(client.Post("/v1/completions", kShort, header + "Authorization: Bearer second\r\n").status, 200);
    EXPECT_EQ(server.engine->submitted().back().tenant, tenant);
  }
  TestServer open;
  EXPECT_EQ(open.Connect().Post("/v1/completions", kShort).status, 200);
  EXPECT_EQ(open.engine->submitted().back().tenant, "default");
}

TEST(Http, KeepAliveAndPipelining) {
  TestServer server;
  Client client = server.Connect();
  std::string requests;
  for (int i = 1; i <= 40; ++i) {
    requests += Client::Format("POST", "/v1/completions", absl::StrCat(R"({"prompt": "hi", "max_tokens": )", i, "}"));
  }
  client.Send(requests);
  for (int i = 1; i <= 40; ++i) {
    const ClientResponse response = client.Read();
    ASSERT_EQ(response.status, 200);
    ASSERT_EQ(response.Json()["usage"]["completion_tokens"], i);
  }
  for (const char byte : Client::Format("GET", "/health", "")) client.Send(std::string_view(&byte, 1));
  EXPECT_EQ(client.Read().status, 200);
}

TEST(Http, ConnectionsCloseWhereAsked) {
  TestServer server;
  Client closing = server.Connect();
  const ClientResponse response = closing.Post("/v1/completions", kShort, "Connection: close\r\n");
  EXPECT_EQ(response.Header("Connection"), "close");
  EXPECT_EQ(closing.ReadAll(), "");
  Client old = server.Connect();
  old.Send("GET /health HTTP/1.0\r\n\r\n");
  EXPECT_THAT(old.ReadAll(), HasSubstr("200 OK"));
  Client kept = server.Connect();
  for (int i = 0; i < 2; ++i) {
    kept.Send("GET /version HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    EXPECT_EQ(kept.Read().Header("Connection"), "keep-alive");
  }
}

TEST(Http, Http10StreamsEndWithTheConnection) {
  TestServer server;
  Client client = server.Connect();
  const std::string body = R"({"prompt": "hi", "max_tokens": 3, "stream": true})";
  client.Send(absl::StrCat("POST /v1/completions HTTP/1.0\r\nContent-Length: ", body.size(), "\r\n\r\n", body));
  const ClientResponse response = client.Read();
  EXPECT_EQ(response.Header("Transfer-Encoding"), "");
  EXPECT_EQ(Events(response.body).back(), "[DONE]");
}

TEST(Http, ChunkedBodiesAndExpectations) {
  TestServer server;
  Client client = server.Connect();
  client.Send(
      "POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"pro\r\ne\r\nmpt\": "
      "\"hello\"}\r\n0\r\n\r\n");
  EXPECT_EQ(client.Read().status, 200);
  const std::string body = kShort;
  client.Send(absl::StrCat("POST /v1/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: ", body.size(),
                           "\r\n\r\n"));
  EXPECT_EQ(client.ReadHead().status, 100);
  client.Send(body);
  EXPECT_EQ(client.Read().status, 200);
}

TEST(Http, LimitsOfHeaderAndBody) {
  TestServer server([](auto& options) {
    options.frontend.max_header_bytes = 1024;
    options.frontend.max_body_bytes = 2000;
  });
  Client large = server.Connect();
  const ClientResponse header = large.Get("/health", "X: " + std::string(4000, 'x') + "\r\n");
  EXPECT_EQ(header.status, 431);
  EXPECT_EQ(header.Json()["error"]["code"], 431);
  EXPECT_EQ(large.ReadAll(), "");
  Client endless = server.Connect();
  endless.Send("GET /" + std::string(100000, 'x'));
  EXPECT_EQ(endless.Read().status, 431);
  Client declared = server.Connect();
  declared.Send("POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n");
  EXPECT_EQ(declared.Read().status, 413);
  Client chunked = server.Connect();
  chunked.Send("POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nbb8\r\n" + std::string(3000, 'x'));
  const ClientResponse body = chunked.Read();
  EXPECT_EQ(body.status, 413);
  EXPECT_THAT(std::string(body.Json()["error"]["message"]), HasSubstr("2000"));
}

TEST(Http, WhatIsNotHttpIsRefused) {
  TestServer server;
  for (const char* bytes :
       {"hello\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "GET /a b c HTTP/1.1\r\n\r\n", "\r\n\r\n\r\n\r\n",
        "GET / HTTP/1.1\r\nbad header\r\n\r\n", "POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"}) {
    Client client = server.Connect();
    client.Send(bytes);
    EXPECT_EQ(client.Read().status, 400) << bytes;
    EXPECT_EQ(client.ReadAll(), "");
  }
}

TEST(Http, PeersThatDoNotFinishAreDropped) {
  TestServer server([](auto& options) { options.frontend.header_timeout = absl::Milliseconds(50); });
  Client silent = server.Connect();
  EXPECT_EQ(silent.ReadAll(), "");
  Client header = server.Connect();
  header.Send("GET /health HT");
  EXPECT_EQ(header.ReadAll(), "");
  Client body = server.Connect();
  body.Send("POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{");
  EXPECT_EQ(body.ReadAll(), "");
}

TEST(Http, IdleConnectionsAreDroppedButNotThoseThatWaitForAnAnswer) {
  TestServer server([](auto& options) {
    options.engine.gate_is_open = false;
    options.frontend.idle_timeout = absl::Milliseconds(50);
  });
  Client waiting = server.Connect();
  waiting.SendPost("/v1/completions", kShort);
  server.engine->AwaitLive(1);
  Client idle = server.Connect();
  EXPECT_EQ(idle.Get("/health").status, 200);
  EXPECT_EQ(idle.ReadAll(), "");
  server.engine->OpenGate();
  EXPECT_EQ(waiting.Read().status, 200);
}

TEST(Http, DisconnectCancels) {
  for (const char* body : {kShort, kLongStream, R"({"prompt": ["a", "b"], "n": 2, "stream": true})"}) {
    TestServer server([](auto& options) { options.engine.gate_is_open = false; });
    {
      Client client = server.Connect();
      client.SendPost("/v1/completions", body);
      server.engine->AwaitSubmitted(1);
      server.engine->AllowSteps(1);
    }
    server.engine->AwaitLive(0);  // without another step
  }
}

TEST(Http, DisconnectWithARequestInThePipelineCancels) {
  TestServer server([](auto& options) { options.engine.gate_is_open = false; });
  {
    Client client = server.Connect();
    client.Send(Client::Format("POST", "/v1/completions", kShort) + Client::Format("GET", "/health", ""));
    server.engine->AwaitLive(1);
  }
  server.engine->AwaitLive(0);
}

TEST(Http, DisconnectBeforeTheRequestWasReadKeepsItFromTheEngine) {
  TestServer server([](auto& options) { options.service.num_threads = 1; });
  std::promise<void> release;
  server.service->Post([held = release.get_future().share()] { held.wait(); });
  {
    Client client = server.Connect();
    client.SendPost("/v1/completions", kShort);
  }
  Client watcher = server.Connect();
  const auto gone = HasSubstr(R"(http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1)");
  while (!testing::Matches(gone)(watcher.Get("/metrics").body)) std::this_thread::yield();
  release.set_value();
  while (watcher.Post("/tokenize", R"({"prompt": "x"})").status != 200 || server.service->num_live() > 0) {
    std::this_thread::yield();
  }
  EXPECT_TRUE(server.engine->submitted().empty());
}

// A peer that stops reading: the kernel's buffers fill, then either bound ends it.
TEST(Http, SlowReadersAreDroppedByTime) {
  TestServer server([](auto& options) {
    options.engine.engine.max_model_len = 1 << 20;
    options.frontend.write_timeout = absl::Milliseconds(100);
    options.service.max_pending_bytes = 1U << 30U;
  });
  Client client = server.Connect(4096);
  client.SendPost("/v1/completions",
                  R"({"prompt": "hi", "max_tokens": 1000000, "stream": true, "return_token_ids": true})");
  server.engine->AwaitSubmitted(1);
  server.engine->AwaitLive(0);
}

TEST(Http, SlowReadersAreDroppedByBytes) {
  TestServer server([](auto& options) {
    options.engine.engine.max_model_len = 1 << 30;
    options.service.max_pending_bytes = 1U << 20U;
  });
  Client client = server.Connect(4096);
  client.SendPost("/v1/completions", R"({"prompt": "hi", "max_tokens": 1000000000, "stream": true})");
  server.engine->AwaitSubmitted(1);
  server.engine->AwaitLive(0);
}

TEST(Http, ConnectionsBeyondTheLimitAreTurnedAway) {
  TestServer server([](auto& options) { options.frontend.max_connections = 2; });
  Client first = server.Connect();
  EXPECT_EQ(first.Get("/health").status, 200);
  {
    Client second = server.Connect();
    EXPECT_EQ(second.Get("/health").status, 200);
    Client third = server.Connect();
    EXPECT_THAT(third.ReadAll(), HasSubstr("503"));
    EXPECT_EQ(first.Get("/health").status, 200);
  }
  while (server.Connect().Get("/health").status != 200) std::this_thread::yield();
}

TEST(Http, DrainingRefusesNewWorkAndFinishesTheOld) {
  TestServer server([](auto& options) { options.engine.gate_is_open = false; });
  Client streaming = server.Connect();
  streaming.SendPost("/v1/completions", R"({"prompt": "hi", "max_tokens": 3, "stream": true})");
  EXPECT_EQ(streaming.ReadHead().status, 200);
  std::thread drain([&] { server.service->Drain(absl::InfiniteFuture()); });
  Client client = server.Connect();
  while (client.Get("/ready").status != 503) std::this_thread::yield();
  EXPECT_EQ(client.Get("/health").status, 200);
  const ClientResponse refused = client.Post("/v1/completions", kShort);
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(refused.Header("Retry-After"), "1");
  EXPECT_THAT(client.Get("/metrics").body, HasSubstr(R"(reason="draining"} 1)"));
  server.engine->OpenGate();
  drain.join();
  std::thread stop([&] { server.frontend->Stop(absl::InfiniteFuture()); });
  std::string stream;
  while (auto chunk = streaming.ReadChunk()) stream += *chunk;
  EXPECT_EQ(Events(stream).back(), "[DONE]");
  stop.join();
  EXPECT_FALSE(server.Connect().is_connected());
}

TEST(Http, StopClosesStreamsAtItsDeadline) {
  TestServer server([](auto& options) { options.engine.gate_is_open = false; });
  Client streaming = server.Connect();
  streaming.SendPost("/v1/completions", kLongStream);
  EXPECT_EQ(streaming.ReadHead().status, 200);
  server.frontend->Stop(absl::Now() + absl::Milliseconds(20));
  EXPECT_EQ(streaming.ReadAll(), "");
  server.engine->AwaitLive(0);
}

TEST(Http, EngineFailure) {
  TestServer server([](auto& options) { options.engine.gate_is_open = false; });
  Client streaming = server.Connect();
  streaming.SendPost("/v1/completions", kLongStream);
  EXPECT_EQ(streaming.ReadHead().status, 200);
  Client waiting = server.Connect();
  waiting.SendPost("/v1/completions", kShort);
  server.engine->AwaitSubmitted(2);
  server.engine->Fail(absl::InternalError("kernel fault"));
  const ClientResponse failed = waiting.Read();
  EXPECT_EQ(failed.status, 500);
  EXPECT_EQ(failed.Json()["error"]["type"], "InternalServerError");
  std::string stream;
  while (auto chunk = streaming.ReadChunk()) stream += *chunk;
  const auto events = Events(stream);
  EXPECT_EQ(nlohmann::json::parse(events.back())["error"]["message"], "kernel fault");
  Client client = server.Connect();
  EXPECT_EQ(client.Get("/health").status, 503);
  EXPECT_EQ(client.Get("/ready").status, 503);
  EXPECT_EQ(client.Post("/v1/completions", kShort).status, 503);
}

TEST(Http, HundredsOfClientsAgainstASmallQueue) {
  TestServer server([](auto& options) {
    options.engine.engine.max_num_seqs = 4;
    options.engine.engine.max_queued_requests = 16;
    options.engine.gate_is_open = false;
  });
  std::vector<Client> clients;
  for (int i = 0; i < 300; ++i) {
    clients.push_back(server.Connect());
    clients.back().SendPost("/v1/completions",
                            i % 2 == 0 ? kShort : R"({"prompt": "hi", "max_tokens": 3, "stream": true})");
  }
  Client watcher = server.Connect();
  while (!testing::Matches(HasSubstr(R"(reason="queue_full"} 280)"))(watcher.Get("/metrics").body))
    std::this_thread::yield();
  server.engine->OpenGate();
  int num_done = 0;
  for (Client& client : clients) {
    const ClientResponse response = client.Read();
    if (response.status == 200) {
      ++num_done;
    } else {
      ASSERT_EQ(response.status, 503);
      ASSERT_EQ(response.Header("Retry-After"), "1");
      ASSERT_EQ(response.Json()["error"]["type"], "ServiceUnavailableError");
    }
  }
  EXPECT_EQ(num_done, 20);
}

}  // namespace
}  // namespace spillway
