# The built program against the official openai client and a gRPC client. Each file is one ctest case; a fixture makes the
# virtual environment once. Without it (no network at the first run) every case skips by name.
find_program(SPILLWAY_PYTHON NAMES python3 PATHS /usr/bin NO_DEFAULT_PATH)
if(SPILLWAY_PYTHON AND NOT SPILLWAY_SANITIZE)
  set(e2e_venv ${CMAKE_BINARY_DIR}/e2e-venv)
  add_test(NAME e2e.environment COMMAND ${CMAKE_SOURCE_DIR}/tests/e2e/make_environment.sh ${SPILLWAY_PYTHON} ${e2e_venv})
  set_tests_properties(e2e.environment PROPERTIES FIXTURES_SETUP e2e SKIP_RETURN_CODE 77 TIMEOUT 600)
  foreach(name openai golden grpc lifecycle program tiers)
    add_test(NAME e2e.${name} COMMAND ${CMAKE_SOURCE_DIR}/tests/e2e/run_tests.sh ${e2e_venv} test_${name}.py)
    set_tests_properties(
      e2e.${name} PROPERTIES FIXTURES_REQUIRED e2e SKIP_RETURN_CODE 77 TIMEOUT 600
                             ENVIRONMENT "SPILLWAY_BINARY=$<TARGET_FILE:spillway>;PYTHONDONTWRITEBYTECODE=1")
  endforeach()
endif()
