#pragma once

// Prometheus metrics under vLLM's names and labels (model_name, engine), served as text by the HTTP front end.

#include <memory>
#include <string>

#include "engine/engine.h"

namespace spillway {

// Any thread; an engine's observer is called by that engine's thread.
class Metrics {
 public:
  static std::unique_ptr<Metrics> Make(const std::string& model_name, int max_model_len, int num_engines = 1);
  virtual ~Metrics() = default;

  // Of engine 0 .. num_engines - 1.
  virtual EngineObserver& ObserverOf(int engine) = 0;
  // Gauges are read from it when scraped. Once each, before the front ends start; it outlives the last Render.
  virtual void Attach(int engine, const Engine& attached) = 0;
  virtual void OnHttpRequest(const std::string& handler, const std::string& method, int status, double seconds) = 0;
  virtual void OnRejection(const std::string& reason) = 0;    // vllm:admission_rejections{reason}
  virtual void OnUnknownField(const std::string& field) = 0;  // spillway_unknown_fields_total; logs each name once
  // The text exposition format, version 0.0.4.
  virtual std::string Render() = 0;
};

}  // namespace spillway
