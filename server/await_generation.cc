#include "server/await_generation.h"

#include <future>
#include <utility>

namespace spillway {
namespace {

class Gatherer : public GenerationListener {
 public:
  explicit Gatherer(std::function<void(const OutputChunk&)> on_chunk) : on_chunk_(std::move(on_chunk)) {}

  void OnPrompt(const PromptInfo& prompt) override { result_.prompt = prompt; }
  void OnChunk(OutputChunk chunk) override {
    const auto index = static_cast<std::size_t>(chunk.index);
    if (result_.choices.size() <= index) result_.choices.resize(index + 1);
    GeneratedChoice& choice = result_.choices[index];
    choice.text += chunk.text;
    for (const SampledToken& token : chunk.tokens) choice.tokens.push_back(token.token);
    if (chunk.finish) choice.finish = *chunk.finish;
    if (on_chunk_) on_chunk_(chunk);
  }
  void OnDone(const absl::Status& status) override {
    if (status.ok()) {
      done_.set_value(std::move(result_));
    } else {
      done_.set_value(status);
    }
  }

  absl::StatusOr<GenerationResult> Await() { return done_.get_future().get(); }

 private:
  const std::function<void(const OutputChunk&)> on_chunk_;
  GenerationResult result_;
  std::promise<absl::StatusOr<GenerationResult>> done_;
};

}  // namespace

absl::StatusOr<GenerationResult> AwaitGeneration(Service& service, GenerationRequest request,
                                                 std::function<void(const OutputChunk&)> on_chunk) {
  const auto gatherer = std::make_shared<Gatherer>(std::move(on_chunk));
  service.Start(std::move(request), gatherer);
  return gatherer->Await();
}

}  // namespace spillway
