#pragma once

// The only two macros for errors. The one who handles a Status logs it; these pass it on.

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define RETURN_IF_ERROR(expression)                            \
  do {                                                         \
    absl::Status status_macro_result = (expression);           \
    if (!status_macro_result.ok()) return status_macro_result; \
  } while (false)

#define ASSIGN_OR_RETURN(declaration, expression) \
  SPILLWAY_ASSIGN_OR_RETURN_(SPILLWAY_CONCAT_(status_or_, __LINE__), declaration, expression)

#define SPILLWAY_CONCAT_INNER_(a, b) a##b
#define SPILLWAY_CONCAT_(a, b) SPILLWAY_CONCAT_INNER_(a, b)
#define SPILLWAY_ASSIGN_OR_RETURN_(temporary, declaration, expression) \
  auto temporary = (expression);                                       \
  if (!temporary.ok()) return temporary.status();                      \
  declaration = std::move(temporary).value()
