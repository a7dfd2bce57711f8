// llama.cpp's library called directly: no server, no sampling but the likeliest token.
//
//   llama_decode quantize BF16.gguf Q8_0.gguf
//   llama_decode greedy MODEL THREADS COUNT < prompts, a line of token ids each
//       a line of JSON for each: [[token, {token: log probability, ...}], ...], the five likeliest of each step
//   llama_decode speed MODEL THREADS CLIENTS PROMPT OUTPUT
//       {"prefill": tokens/s, "decode": tokens/s}, of all clients together; the prompts are computed one by one
//
// Built by build_llama_cpp.sh.

#include <llama.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <numeric>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void Check(bool ok, const std::string& what) {
  if (ok) return;
  std::cerr << "llama_decode: " << what << "\n";
  std::exit(1);
}

class Session {
 public:
  Session(const char* path, int threads, int clients, int tokens_per_client)
      : model_(llama_model_load_from_file(path, llama_model_default_params()), llama_model_free) {
    Check(model_ != nullptr, std::string("cannot load ") + path);
    llama_context_params params = llama_context_default_params();
    params.n_seq_max = static_cast<unsigned>(clients);
    params.n_ctx = static_cast<unsigned>(clients * tokens_per_client);
    params.n_batch = 2048;
    params.n_threads = params.n_threads_batch = threads;
    context_.reset(llama_init_from_model(model_.get(), params));
    Check(context_ != nullptr, "no context");
    vocab_ = llama_vocab_n_tokens(llama_model_get_vocab(model_.get()));
    batch_ = llama_batch_init(2048, 0, 1);
  }
  ~Session() { llama_batch_free(batch_); }

  int vocab() const { return vocab_; }
  void Clear() { llama_memory_clear(llama_get_memory(context_.get()), true); }

  void Add(llama_token token, int position, int sequence, bool wants_logits) {
    const int i = batch_.n_tokens++;
    batch_.token[i] = token;
    batch_.pos[i] = position;
    batch_.n_seq_id[i] = 1;
    batch_.seq_id[i][0] = sequence;
    batch_.logits[i] = wants_logits ? 1 : 0;
  }
  void Run() {
    Check(llama_decode(context_.get(), batch_) == 0, "llama_decode failed");
    batch_.n_tokens = 0;
  }
  // Computes a prompt; its last logits are wanted.
  void Prefill(const std::vector<llama_token>& prompt, int sequence) {
    const int size = static_cast<int>(prompt.size());
    for (int i = 0; i < size; ++i) {
      Add(prompt[static_cast<std::size_t>(i)], i, sequence, i + 1 == size);
      if (batch_.n_tokens == 2048 || i + 1 == size) Run();
    }
    last_row_ = (size - 1) % 2048;
  }
  const float* logits(int row) const { return llama_get_logits_ith(context_.get(), row); }
  int last_row() const { return last_row_; }

 private:
  std::unique_ptr<llama_model, decltype(&llama_model_free)> model_;
  std::unique_ptr<llama_context, decltype(&llama_free)> context_{nullptr, llama_free};
  llama_batch batch_{};
  int vocab_ = 0;
  int last_row_ = 0;
};

// Prints a step and returns its likeliest token.
llama_token PrintStep(const float* logits, int vocab) {
  std::vector<llama_token> order(static_cast<std::size_t>(vocab));
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + 5, order.end(),
                    [&](llama_token a, llama_token b) { return logits[a] > logits[b]; });
  double sum = 0;
  for (int i = 0; i < vocab; ++i) sum += std::exp(logits[i] - logits[order[0]]);
  std::printf("[%d, {", order[0]);
  for (int i = 0; i < 5; ++i) {
    const llama_token token = order[static_cast<std::size_t>(i)];
    std::printf("%s\"%d\": %.6f", i > 0 ? ", " : "", token, logits[token] - logits[order[0]] - std::log(sum));
  }
  std::printf("}]");
  return order[0];
}

void Greedy(Session& session, int count) {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::vector<llama_token> prompt;
    for (llama_token token = 0; words >> token;) prompt.push_back(token);
    session.Clear();
    session.Prefill(prompt, 0);
    int position = static_cast<int>(prompt.size());
    const float* logits = session.logits(session.last_row());
    std::printf("[");
    for (int i = 0; i < count; ++i) {
      if (i > 0) std::printf(", ");
      const llama_token token = PrintStep(logits, session.vocab());
      session.Add(token, position++, 0, true);
      session.Run();
      logits = session.logits(0);
    }
    std::printf("]\n");
  }
}

void Speed(Session& session, int clients, int prompt, int output) {
  const auto token = [&](int client, int i) { return (i * 7919 + client * 104729) % session.vocab(); };
  double prefill_seconds = 0;
  for (int client = 0; client < clients; ++client) {
    std::vector<llama_token> tokens;
    for (int i = 0; i < prompt; ++i) tokens.push_back(token(client, i));
    const double begin = Now();
    session.Prefill(tokens, client);
    session.logits(session.last_row());
    prefill_seconds += Now() - begin;
  }
  std::vector<llama_token> next(static_cast<std::size_t>(clients));
  const double begin = Now();
  for (int step = 0; step < output; ++step) {
    for (int client = 0; client < clients; ++client) {
      session.Add(next[static_cast<std::size_t>(client)], prompt + step, client, true);
    }
    session.Run();
    for (int client = 0; client < clients; ++client) {
      const float* const logits = session.logits(client);
      next[static_cast<std::size_t>(client)] =
          static_cast<llama_token>(std::max_element(logits, logits + session.vocab()) - logits);
    }
  }
  const double decode_seconds = Now() - begin;
  std::printf("{\"prefill\": %.2f, \"decode\": %.2f}\n", clients * prompt / prefill_seconds,
              clients * output / decode_seconds);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view what = argc > 1 ? argv[1] : "";
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::cerr << text;
      },
      nullptr);
  llama_backend_init();
  if (what == "quantize" && argc == 4) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = LLAMA_FTYPE_MOSTLY_Q8_0;
    Check(llama_model_quantize(argv[2], argv[3], &params) == 0, "cannot quantize");
    return 0;
  }
  if (what == "greedy" && argc == 5) {
    Session session(argv[2], std::atoi(argv[3]), 1, 2048);
    Greedy(session, std::atoi(argv[4]));
    return 0;
  }
  Check(what == "speed" && argc == 7, "quantize, greedy or speed, as its source says");
  const int clients = std::atoi(argv[4]);
  const int prompt = std::atoi(argv[5]);
  const int output = std::atoi(argv[6]);
  Session session(argv[2], std::atoi(argv[3]), clients, prompt + output + 64);
  Speed(session, 1, prompt, 4);  // warm
  session.Clear();
  Speed(session, clients, prompt, output);
  return 0;
}
