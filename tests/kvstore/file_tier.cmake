spillway_test(file_tier_test
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/file_tier_crash_test.cc
          ${CMAKE_CURRENT_LIST_DIR}/file_tier_foreign_bytes_test.cc
          ${CMAKE_CURRENT_LIST_DIR}/file_tier_index_test.cc
          ${CMAKE_CURRENT_LIST_DIR}/file_tier_test.cc
  LIBS spillway_kvstore)
