# Installs the two public headers, the library, the CMake package and the pkg-config file. All of it is relocatable:
# a wheel is the same tree inside the Python package.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
if(SKBUILD)
  set(CMAKE_INSTALL_INCLUDEDIR include)
  set(CMAKE_INSTALL_LIBDIR lib)
endif()
set(FWP_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/fwp_core)
set(FWP_PKGCONFIG_DIR ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

install(FILES cpp/include/fwp/fwp.h cpp/include/fwp/fwp.hpp DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/fwp)
install(TARGETS fwp_core EXPORT fwp_core-targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})

install(EXPORT fwp_core-targets NAMESPACE fwp_core:: DESTINATION ${FWP_CMAKE_DIR})
configure_package_config_file(
  cmake/fwp_core-config.cmake.in fwp_core-config.cmake INSTALL_DESTINATION ${FWP_CMAKE_DIR})
write_basic_package_version_file(fwp_core-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  "${PROJECT_BINARY_DIR}/fwp_core-config.cmake"
  "${PROJECT_BINARY_DIR}/fwp_core-config-version.cmake"
  DESTINATION ${FWP_CMAKE_DIR})

file(RELATIVE_PATH FWP_PREFIX_FROM_PC "/${FWP_PKGCONFIG_DIR}" "/")
string(REGEX REPLACE "/$" "" FWP_PREFIX_FROM_PC "${FWP_PREFIX_FROM_PC}")
configure_file(cmake/fwp_core.pc.in fwp_core.pc @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/fwp_core.pc" DESTINATION ${FWP_PKGCONFIG_DIR})
