# Carried: see carried.cmake.
include(${CMAKE_CURRENT_LIST_DIR}/carried.cmake)
set(OpenSSL_FOUND TRUE)
