# A kernel object may share nothing with objects of another instruction set level: the linker keeps one copy of a weak
# symbol, perhaps one that needs instructions the machine lacks. So: no weak symbol, and one exported symbol.
execute_process(
  COMMAND "${NM}" --extern-only "${OBJECT}" OUTPUT_VARIABLE listing COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+ [A-Za-z] [^\n]+" symbols "${listing}")
set(exported "")
foreach(symbol IN LISTS symbols)
  if(symbol MATCHES " [VvWwu] ")
    message(SEND_ERROR "weak symbol in ${OBJECT}: ${symbol}")
  elseif(NOT symbol MATCHES " U ")
    list(APPEND exported "${symbol}")
  endif()
endforeach()
list(LENGTH exported count)
if(NOT count EQUAL 1)
  message(SEND_ERROR "expected one exported symbol in ${OBJECT}, got ${count}: ${exported}")
endif()
