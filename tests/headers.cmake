# Every header compiles alone. Where x.cc includes x.h first (layering.cmake holds that), its compilation is the proof; for the
# other headers a source that includes nothing else is made here.
set(sources)
foreach(folder kernels kvstore engine server)
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE ${CMAKE_SOURCE_DIR} ${CMAKE_SOURCE_DIR}/${folder}/*.h)
  foreach(header ${headers})
    string(REGEX REPLACE "\\.h$" ".cc" source ${header})
    if(EXISTS ${CMAKE_SOURCE_DIR}/${source} OR header MATCHES "-inl\\.h$" OR header MATCHES "/cuda/")
      continue()  # -inl.h files need their includer, cuda's need nvcc
    endif()
    set(alone ${CMAKE_BINARY_DIR}/headers/${source})
    file(CONFIGURE OUTPUT ${alone} CONTENT "#include \"${header}\"\n" @ONLY)
    list(APPEND sources ${alone})
  endforeach()
endforeach()
add_library(headers_alone OBJECT ${sources})
target_link_libraries(headers_alone PRIVATE spillway_server spillway_proto)
