from gateway_sdk import *
