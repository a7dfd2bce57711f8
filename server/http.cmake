find_package(Boost 1.81 REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(prometheus-cpp REQUIRED COMPONENTS core)
find_package(spdlog REQUIRED)

target_sources(
  spillway_server
  PRIVATE chat_template.cc
          cost_model_json.cc
          http_exchange.cc
          http_frontend.cc
          http_server.cc
          metrics.cc
          openai_answer.cc
          openai_format.cc
          openai_json.cc
          openai_request.cc
          sampling_check.cc
          service.cc
          text_output.cc)
target_link_libraries(spillway_server PUBLIC nlohmann_json::nlohmann_json absl::strings absl::time absl::status absl::statusor
                      PRIVATE prometheus-cpp::core Boost::boost spdlog::spdlog)
set_source_files_properties(http_frontend.cc PROPERTIES COMPILE_DEFINITIONS SPILLWAY_VERSION="${PROJECT_VERSION}")
# One thread runs each io_context: the fences between handlers are not needed, and TSan does not know them.
target_compile_definitions(spillway_server PUBLIC BOOST_ASIO_DISABLE_FENCED_BLOCK)
