// In place of the header of CUDA that has this name.
#pragma once
#include "emulation.h"
