# The file tier. The shared library of xxHash has XXH3 for several vector widths and chooses at run time; its headers have not.
find_package(OpenSSL REQUIRED)
find_library(SPILLWAY_XXHASH_LIBRARY xxhash REQUIRED)

target_sources(spillway_kvstore PRIVATE
  ${CMAKE_CURRENT_LIST_DIR}/file_tier.cc
  ${CMAKE_CURRENT_LIST_DIR}/file_tier_block_file.cc
  ${CMAKE_CURRENT_LIST_DIR}/file_tier_budget.cc
  ${CMAKE_CURRENT_LIST_DIR}/file_tier_directory.cc
  ${CMAKE_CURRENT_LIST_DIR}/file_tier_format.cc
  ${CMAKE_CURRENT_LIST_DIR}/file_tier_index.cc)
target_link_libraries(spillway_kvstore PRIVATE OpenSSL::Crypto ${SPILLWAY_XXHASH_LIBRARY} Threads::Threads absl::flat_hash_map absl::flat_hash_set
                                               absl::status absl::statusor absl::str_format absl::strings)
