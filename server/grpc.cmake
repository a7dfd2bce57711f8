# The gRPC front end.
find_package(fmt REQUIRED GLOBAL)

add_library(spillway_grpc STATIC grpc_frontend.cc grpc_generate.cc grpc_health.cc grpc_request.cc)
target_compile_definitions(spillway_grpc PRIVATE SPILLWAY_VERSION="${PROJECT_VERSION}")
target_link_libraries(spillway_grpc PUBLIC spillway_server PRIVATE spillway_proto fmt::fmt grpc++_reflection)
