#pragma once

// Prometheus metrics under vLLM's names and labels (model_name, engine), served as text by the HTTP front end.

#include <memory>
#include <string>

#include "engine/engine.h"

namespace spillway {

// Any thread; the observer's methods come from the engine thread.
class Metrics : public EngineObserver {
 public:
  static std::unique_ptr<Metrics> Make(const std::string& model_name, int max_model_len);
  ~Metrics() override = default;

  // Gauges are read from `engine` when scraped. Once, before the front ends start; `engine` outlives the last Render.
  virtual void Attach(const Engine& engine) = 0;
  virtual void OnHttpRequest(const std::string& handler, const std::string& method, int status, double seconds) = 0;
  virtual void OnRejection(const std::string& reason) = 0;    // vllm:admission_rejections{reason}
  virtual void OnUnknownField(const std::string& field) = 0;  // spillway_unknown_fields_total; logs each name once
  // The text exposition format, version 0.0.4.
  virtual std::string Render() = 0;
};

}  // namespace spillway
